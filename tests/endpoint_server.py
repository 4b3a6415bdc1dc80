"""A small OpenAI-compatible server on 127.0.0.1 that answers by a script and writes down what it was asked. For the tests alone."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Raw:
    """An answer that is no chat completion: status, body and headers as given. delay_s: seconds before it; hang: never answer."""

    status: int = 200
    body: Any = ""
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    hang: bool = False


@dataclass
class Call:
    path: str
    body: dict[str, Any]
    headers: dict[str, str]

    @property
    def text(self) -> str:
        """All messages, one after the other."""
        return "\n".join(m["content"] for m in self.body["messages"])


Script = Callable[[Call, int], "Raw | str | dict[str, Any]"]
"""(what was asked, how many calls came before it) -> a Raw answer, or the content of a chat completion (a dict is sent as JSON text)."""


def completion(content: str | None, usage: tuple[int, int] | None = (100, 10), finish: str = "stop") -> dict[str, Any]:
    told = {} if usage is None else {"usage": {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)}}
    message = {"role": "assistant", "content": content}
    return {"id": "c", "object": "chat.completion", "choices": [{"index": 0, "message": message, "finish_reason": finish}], **told}


class _Http(ThreadingHTTPServer):
    request_queue_size = 256  # the default of 5 refuses connections when many come at once
    daemon_threads = True
    block_on_close = False


class EndpointServer:
    """Use as a context manager. calls: everything that was asked, in order of arrival; most_at_once: requests that were in work together."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.calls: list[Call] = []
        self.most_at_once = 0
        self._now, self._lock, self._closing = 0, threading.Lock(), threading.Event()
        self._http = _Http(("127.0.0.1", 0), self._handler())
        self.root = f"http://127.0.0.1:{self._http.server_address[1]}"
        self.base_url = f"{self.root}/v1"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> EndpointServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def _answer(self, call: Call) -> Raw | None:
        with self._lock:
            number = len(self.calls)
            self.calls.append(call)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            found = self.script(call, number)
            answer = found if isinstance(found, Raw) else Raw(body=completion(found if isinstance(found, str) else json.dumps(found)))
            if answer.hang:
                self._closing.wait()
                return None
            self._closing.wait(answer.delay_s) if answer.delay_s else None
            return answer
        finally:
            with self._lock:
                self._now -= 1

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # without it every answer on a kept connection waits 40 ms for an acknowledgement

            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                answer = server._answer(Call(self.path, json.loads(raw) if raw else {}, dict(self.headers)))
                if answer is None:
                    self.close_connection = True
                    return
                body = answer.body if isinstance(answer.body, str) else json.dumps(answer.body)
                self.send_response(answer.status)
                for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body.encode())), **answer.headers}.items():
                    self.send_header(name, value)
                self._headers_buffer.append(b"\r\n" + body.encode())  # type: ignore[attr-defined]
                self.flush_headers()

            do_GET = do_POST

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler
