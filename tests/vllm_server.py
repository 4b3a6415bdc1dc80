"""A scripted vLLM server on 127.0.0.1 with real numbers: a tiny policy of its own answers, and weights are read from the files it is told.

It speaks the part of vLLM 0.32's API that llmrl/vllm_client.py uses, keeps its rules (an update begins once, tokens computed during one kill
the process, a restarted server holds its first weights), and misbehaves as POST /control says. `Scripted` runs it in a process of its own;
`python -m tests.vllm_server FOLDER PORT` does by hand. `Real` starts a true vLLM server in the environment that LLMRL_VLLM_PYTHON names.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing as mp
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from tests.vllm_state import Refused, State

CONTENT = ("more_ids", "too_long", "empty", "nan", "other_prompt", "banned", "bare")
"""Faults of an answer that is otherwise whole, which asking again may mend; "short" is another."""


def spoil(mode: str, answer: dict[str, Any]) -> None:
    """Makes an answer wrong in one way."""
    choice = answer["choices"][0]
    ids, told = list(choice["token_ids"]), (choice["logprobs"] or {"token_logprobs": [0.0]})["token_logprobs"]
    match mode:
        case "more_ids":
            choice["token_ids"] = [*ids, 5]
        case "too_long":
            choice["token_ids"], told[:] = [*ids] * 50, [*told] * 50
        case "short":
            choice["token_ids"], told[:], choice["finish_reason"] = ids[:1], told[:1], "length"
        case "empty":
            choice["token_ids"], told[:] = [], []
        case "nan":
            told[-1] = float("nan")
        case "other_prompt":
            choice["prompt_token_ids"] = [*choice["prompt_token_ids"], 5]
        case "banned":
            ids[0] = 0
            choice["token_ids"] = ids
        case "bare":
            del choice["logprobs"]


def handler(state: State) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body, path = (json.loads(raw) if raw else {}), self.path.partition("?")[0]
            if path == "/control":
                return self.tell(200, json.dumps(state.control(body)))
            probe = 100.0 in body.get("logit_bias", {}).values()  # the look at --logprobs-mode: counts for itself, and faults do not meet it
            state.calls["probe" if probe else path] += 1
            fault = {} if probe else state.fault(path)
            mode = fault.get("mode", "")
            if mode in ("400", "500", "503"):
                return self.tell(int(mode), json.dumps({"error": {"message": f"scripted {mode}", "code": int(mode)}}))
            if mode == "die":
                os._exit(9)
            if mode == "hang":
                time.sleep(3600)
            if mode == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
                return self.connection.close()
            state.now += 1
            state.most = max(state.most, state.now)
            try:
                answer = state.answer(self.path, body, fault)
            except Refused as no:
                return self.tell(no.status, json.dumps({"error": {"message": str(no), "code": no.status}}))
            finally:
                state.now -= 1
            if isinstance(answer, str):
                return self.tell(200, answer)
            if "choices" in answer and "token_ids" in answer["choices"][0] and not probe:
                spoil(mode, answer)
            text = "<html>a proxy's page</html>" if mode == "nonjson" else json.dumps(answer)
            self.tell(200, text, cut=mode == "truncated")

        do_GET = do_POST

        def tell(self, status: int, text: str, *, cut: bool = False) -> None:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # who asked has gone
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode()[: len(text) // 2] if cut else text.encode())
            self.close_connection = self.close_connection or cut

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler


class _Http(ThreadingHTTPServer):
    request_queue_size = 512
    daemon_threads = True
    allow_reuse_address = True


def serve(model: str, port: int, how: dict[str, Any] | None = None) -> None:
    torch.set_num_threads(1)
    _Http(("127.0.0.1", port), handler(State(model, **(how or {})))).serve_forever()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def ask(url: str, path: str, body: dict[str, Any] | None = None, timeout_s: float = 10.0) -> Any:
    request = urllib.request.Request(url + path, json.dumps(body or {}).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout_s) as answer:
        return json.loads(answer.read() or b"{}")


class Scripted:
    """A scripted server in a process of its own; killed and started again on the same port as often as a test wants."""

    def __init__(self, model: str | Path, **how: Any) -> None:
        self.model, self.port, self.how = str(model), free_port(), how
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: Any = None

    def start(self) -> Scripted:
        self.process = forks().Process(target=serve, args=(self.model, self.port, self.how), daemon=True)
        self.process.start()
        return self

    def wait(self, limit_s: float = 60.0) -> Scripted:
        end = time.monotonic() + limit_s
        while True:
            try:
                ask(self.url, "/health")
                return self
            except OSError:
                if time.monotonic() > end or not self.process.is_alive():
                    raise RuntimeError(f"the scripted server on {self.url} did not start") from None
                time.sleep(0.02)

    def control(self, **body: Any) -> dict[str, Any]:
        return ask(self.url, "/control", body)

    def freeze(self, on: bool = True) -> None:
        os.kill(self.process.pid, signal.SIGSTOP if on else signal.SIGCONT)

    def kill(self) -> None:
        if self.process is not None and self.process.is_alive():
            self.process.kill()
        if self.process is not None:
            self.process.join(10)


def forks() -> Any:
    """Processes forked from one that has imported torch already and nothing else: a server is there within a second."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.vllm_server"])
    return context


class Real:
    """A true vLLM server (CPU or GPU) in its own process group."""

    def __init__(
        self, model: str | Path, log: Path, *, dtype: str = "float32", port: int | None = None, backend: str = "llmrl_broadcast", lora: bool = False,
        mode: str = "processed_logprobs", length: int = 256,
    ) -> None:  # fmt: skip
        self.python = os.environ["LLMRL_VLLM_PYTHON"]
        self.more = ["--logprobs-mode", mode, "--max-model-len", str(length), "--weight-transfer-config", json.dumps({"backend": backend})]
        self.more += ["--enable-lora", "--max-lora-rank", "16"] if lora else []
        self.model, self.log, self.dtype, self.port = str(model), log, dtype, port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Real:
        env = {
            **os.environ, "VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
            "VLLM_PLUGINS": "llmrl", "DO_NOT_TRACK": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        }  # fmt: skip
        env.pop("PYTHONPATH", None)
        command = [
            self.python, "-m", "vllm.entrypoints.openai.api_server", "--model", self.model, "--port", str(self.port), "--host", "127.0.0.1",
            "--dtype", self.dtype, "--enforce-eager", "--max-num-seqs", "64",
            "--no-enable-chunked-prefill", *self.more,  # on CPU a seeded request whose prompt is cut in chunks kills the server
        ]  # fmt: skip
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True, cwd=self.log.parent)
        return self

    def wait(self, limit_s: float = 300.0) -> Real:
        end = time.monotonic() + limit_s
        while True:
            assert self.process is not None
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return self
            except OSError:
                if time.monotonic() > end or self.process.poll() is not None:
                    raise RuntimeError(f"vLLM did not start; the end of {self.log}: {self.log.read_text(errors='replace')[-2000:]}") from None
                time.sleep(0.5)

    def kill(self) -> None:
        """Asks it to end, so that it gives its shared memory back; after 20 s the whole group is killed."""
        if self.process is not None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
