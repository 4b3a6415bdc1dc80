"""A scripted vLLM server on 127.0.0.1 with real numbers: a tiny policy of its own answers, and weights are read from the files it is told.

It speaks the part of vLLM 0.32's API that llmrl/vllm_client.py uses, keeps its rules (an update begins once, tokens computed during one kill
the process, a restarted server holds its first weights), and misbehaves as POST /control says. `Scripted` runs it in a process of its own;
`python -m tests.vllm_server FOLDER PORT` does by hand. `Real` starts a true vLLM server in the environment that LLMRL_VLLM_PYTHON names.
"""

from __future__ import annotations

import contextlib
import copy
import json
import multiprocessing as mp
import os
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from llmrl.batch import pack
from llmrl.hf_engine import HFEngine
from llmrl.models import load_policy
from llmrl.recipe import Model
from llmrl.records import Request, Sample, Sampling
from llmrl.strategy import PackedLogp

CONTENT = ("more_ids", "too_long", "empty", "nan", "other_prompt", "banned", "bare")
"""Faults of an answer that is otherwise whole, which asking again may mend; "short" is another."""


class Refused(Exception):
    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class State:
    """What one server process holds."""

    def __init__(self, model: str) -> None:
        self.name = model
        self.policy = load_policy(Model(path=model))
        self.engine = HFEngine(self.policy)
        self.first = copy.deepcopy(self.policy.model.state_dict())
        self.label, self.active, self.repair = "default", False, True
        self.faults: list[dict[str, Any]] = []
        self.calls: Counter[str] = Counter()
        self.now = self.most = 0
        self.latency_s = 0.0
        self.lock = threading.Lock()
        """Held while the policy is used or changed."""
        self.open = threading.Event()
        """Unset while paused."""
        self.open.set()
        self.waiting: queue.Queue[tuple[dict[str, Any], queue.Queue[Any]]] = queue.Queue()
        threading.Thread(target=self.work, daemon=True).start()

    # ------------------------------------------------------------ tokens

    def work(self) -> None:
        """Answers everything that waits in one batch, as long as it is not paused."""
        while True:
            jobs = [self.waiting.get()]
            while True:
                try:
                    jobs.append(self.waiting.get_nowait())
                except queue.Empty:
                    break
            self.open.wait()
            with self.lock:
                if self.active:
                    os._exit(77)  # what vLLM does when it computes with weights that are not there
                for (body, reply), done in zip(jobs, self.generate([b for b, _ in jobs]), strict=True):
                    reply.put((body, done))

    def generate(self, bodies: list[dict[str, Any]]) -> list[Any]:
        first = bodies[0]
        self.policy.banned_ids = tuple(int(i) for i, bias in first.get("logit_bias", {}).items() if bias == -100.0)
        self.policy.stop_ids = frozenset(first.get("stop_token_ids", []))
        asked = [
            Request(
                tuple(b["prompt"]), (b.get("seed", 0),),
                Sampling(
                    b["max_tokens"], b["temperature"], b.get("top_p", 1.0), max(0, b.get("top_k", 0)), b.get("min_p", 0.0), tuple(b.get("stop", ())),
                ),
            )
            for b in bodies
        ]  # fmt: skip
        return self.engine.generate(asked)

    def prompt_logprobs(self, ids: list[int]) -> list[Any]:
        (b,) = pack([Sample("p", "p", [ids[0]], list(ids[1:]), None, 0)], [torch.zeros(len(ids) - 1)], tokens=len(ids))
        with self.lock, torch.no_grad():
            plan = b.plan(self.policy.kernel)
            logp, _ = PackedLogp(self.policy, 1024)(b.ids_P, b.positions_P, plan, b.source_T, b.tokens_T, 1.0, False, False)
        return [None, *({str(i): {"logprob": x, "rank": 1}} for i, x in zip(ids[1:], logp.tolist(), strict=True))]

    def completion(self, body: dict[str, Any]) -> dict[str, Any]:
        if body.get("model") != self.name:
            raise Refused(404, f"The model `{body.get('model')}` does not exist.")
        if len(body["prompt"]) + body["max_tokens"] > self.engine.max_length:  # type: ignore[operator]
            raise Refused(400, f"max_tokens={body['max_tokens']} cannot be greater than what max_model_len leaves")
        reply: queue.Queue[Any] = queue.Queue()
        self.waiting.put((body, reply))
        _, c = reply.get()
        time.sleep(self.latency_s * len(c.token_ids))
        choice = {
            "index": 0, "text": c.text, "finish_reason": c.finish, "token_ids": c.token_ids, "prompt_token_ids": body["prompt"],
            "logprobs": {"token_logprobs": c.logprobs, "tokens": c.token_ids} if "logprobs" in body else None,
            "prompt_logprobs": self.prompt_logprobs(body["prompt"]) if "prompt_logprobs" in body else None,
        }  # fmt: skip
        return {"id": "cmpl-0", "object": "text_completion", "model": self.name, "choices": [choice]}

    # ------------------------------------------------------------ weights

    def update(self, path: str, fault: dict[str, Any]) -> None:
        from safetensors.torch import load_file

        if not self.active:
            raise Refused(500, "Worker failed with error 'start_weight_update must be called before update_weights.'")
        if not Path(path).is_file():
            self.active = False
            raise Refused(500, "Worker failed with error 'No such file or directory: <path>'")
        model = self.policy.model
        with self.lock, torch.no_grad():
            if fault.get("mode") == "stale_head":  # vLLM on CPU keeps a packed copy of a tied embedding
                model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
            there = dict(model.named_parameters())
            for name, tensor in load_file(path).items():
                if fault.get("mode") != "drop" or name != fault["name"]:
                    there[name].copy_(tensor)

    def start(self) -> None:
        if self.active:
            raise Refused(500, "Worker failed with error 'start_weight_update called while a weight update is already active.'")
        with self.lock:
            self.active = True

    def finish(self, label: str | None) -> None:
        if not self.active:
            raise Refused(500, "Worker failed with error 'finish_weight_update called without a matching start_weight_update.'")
        self.active, self.label = False, label or self.label

    def abort(self) -> None:
        self.open.clear()
        from llmrl.records import Completion

        with contextlib.suppress(queue.Empty):
            while True:
                body, reply = self.waiting.get_nowait()
                reply.put((body, Completion([], [], "abort", 0, "")))  # type: ignore[arg-type]

    # ------------------------------------------------------------ what is asked

    def fault(self, path: str) -> dict[str, Any]:
        """The fault that this call meets; {} for none."""
        for fault in self.faults:
            if fault.get("path", "/v1/completions") != path:
                continue
            if fault.get("after", 0) > 0:
                fault["after"] -= 1
                continue
            fault["times"] = fault.get("times", -1) - 1
            if fault["times"] == 0:
                self.faults.remove(fault)
            return fault
        return {}

    def control(self, body: dict[str, Any]) -> dict[str, Any]:
        """{"mode", "path", "after", "times"} adds a fault; {"clear": true} takes all away; {"latency_s"} seconds a token; {"restarted": true}
        puts the first weights back. Tells what was asked."""
        if body.get("clear"):
            self.faults = []
        if body.get("restarted") and self.label != "default":
            with self.lock:
                self.policy.model.load_state_dict(self.first)
            self.label = "default"
        self.latency_s = body.get("latency_s", self.latency_s)
        if "mode" in body:
            self.faults.append(body)
        return {"calls": dict(self.calls), "most": self.most, "label": self.label, "pid": os.getpid(), "repair": self.repair}

    def answer(self, path: str, body: dict[str, Any], fault: dict[str, Any]) -> Any:
        match path.partition("?")[0]:
            case "/v1/models":
                return {"object": "list", "data": [{"id": self.name, "max_model_len": self.engine.max_length}]}
            case "/v1/completions":
                return self.completion(body)
            case "/weight_info":
                return {"weight_version": self.label}
            case "/init_weight_transfer_engine":
                self.repair = body["init_info"].get("repair", True)
            case "/start_weight_update":
                self.start()
            case "/update_weights":
                self.update(body["update_info"]["path"], fault)
            case "/finish_weight_update":
                self.finish(body.get("weight_version"))
            case "/pause":
                self.abort()
            case "/resume":
                self.open.set()
            case "/reset_prefix_cache" | "/health":
                pass
            case _:
                raise Refused(404, "Not Found")
        return {"message": "ok"}


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
            state.calls[path] += 1
            fault = state.fault(path)
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
            if "choices" in answer:
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


def serve(model: str, port: int) -> None:
    torch.set_num_threads(1)
    _Http(("127.0.0.1", port), handler(State(model))).serve_forever()


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

    def __init__(self, model: str | Path) -> None:
        self.model, self.port = str(model), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: Any = None

    def start(self) -> Scripted:
        self.process = forks().Process(target=serve, args=(self.model, self.port), daemon=True)
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

    def __init__(self, model: str | Path, log: Path, *, dtype: str = "float32", port: int | None = None) -> None:
        self.python = os.environ["LLMRL_VLLM_PYTHON"]
        self.model, self.log, self.dtype, self.port = str(model), log, dtype, port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Real:
        env = {
            **os.environ, "VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
            "VLLM_PLUGINS": "llmrl", "DO_NOT_TRACK": "1",
        }  # fmt: skip
        env.pop("PYTHONPATH", None)
        command = [
            self.python, "-m", "vllm.entrypoints.openai.api_server", "--model", self.model, "--port", str(self.port), "--host", "127.0.0.1",
            "--dtype", self.dtype, "--enforce-eager", "--logprobs-mode", "processed_logprobs", "--max-num-seqs", "64",
            "--max-model-len", "256", "--no-enable-chunked-prefill",  # on CPU a seeded request whose prompt is cut in chunks kills the server
            "--weight-transfer-config", '{"backend": "llmrl_file"}',
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
