"""What a scripted vLLM server holds and answers: a tiny policy, weights that change as the calls say, adapters, sleep. HTTP: vllm_server.py."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import queue
import threading
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from llmrl.batch import pack
from llmrl.hf_engine import HFEngine
from llmrl.models import load_policy
from llmrl.recipe import Model
from llmrl.records import Request, Sample, Sampling
from llmrl.strategy import PackedLogp
from llmrl.vllm_broadcast import BROKEN, Group, GroupFailed, host_towards, received, unpacked


class Refused(Exception):
    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class State:
    """What one server process holds."""

    def __init__(self, model: str, backend: str = "llmrl_file", lora: bool = False, dev: bool = True) -> None:
        self.name, self.backend, self.lora, self.dev = model, backend, lora, dev
        self.group: Group | None = None
        self.adapters: dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]] = {}
        """The weights that each changes: as they are without it, and with it."""
        self.used = model
        """The model or adapter whose weights the policy holds now."""
        self.asleep: set[str] = set()
        self.raw = False
        """Log-probs are the model's own, as without --logprobs-mode."""
        self.history: list[str] = []
        """Calls in order, but for looks; the same one many times in a row counts once."""
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
                for name in dict.fromkeys(body["model"] for body, _ in jobs):
                    some = [job for job in jobs if job[0]["model"] == name]
                    self.use(name)
                    for (body, reply), done in zip(some, self.generate([b for b, _ in some]), strict=True):
                        reply.put((body, done))

    @torch.no_grad()
    def use(self, name: str) -> None:
        """Puts an adapter's weights into the policy, or takes them out again."""
        there = dict(self.policy.model.named_parameters())
        if name != self.used:
            for key, (base, _) in self.adapters.get(self.used, {}).items():
                there[key].copy_(base)
            for key, (_, merged) in self.adapters.get(name, {}).items():
                there[key].copy_(merged)
            self.used = name

    def load_adapter(self, name: str, path: str) -> None:
        from safetensors.torch import load_file

        if not self.lora:
            raise Refused(500, "Call to add_lora method failed: LoRA is not enabled. Use --enable-lora to enable LoRA.")
        if not Path(path).is_dir():
            raise Refused(404, f"Loading lora {name} failed: No adapter found for {path}")
        config = json.loads((Path(path) / "adapter_config.json").read_text())
        tensors = load_file(Path(path) / "adapter_model.safetensors")
        with self.lock:
            self.use(self.name)
            there = dict(self.policy.model.named_parameters())
            made = {}
            for key in [k for k in tensors if k.endswith(".lora_A.weight")]:
                stem = key.removesuffix(".lora_A.weight")
                weight = there[f"{stem.removeprefix('base_model.model.')}.weight"].detach()
                delta = config["lora_alpha"] / config["r"] * (tensors[f"{stem}.lora_B.weight"] @ tensors[key])
                made[f"{stem.removeprefix('base_model.model.')}.weight"] = (weight.clone(), weight + delta)
            self.adapters[name] = made

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

    def prompt_logprobs(self, ids: list[int], name: str) -> list[Any]:
        (b,) = pack([Sample("p", "p", [ids[0]], list(ids[1:]), None, 0)], [torch.zeros(len(ids) - 1)], tokens=len(ids))
        with self.lock, torch.no_grad():
            self.use(name)
            plan = b.plan(self.policy.kernel)
            logp, _ = PackedLogp(self.policy, 1024)(b.ids_P, b.positions_P, plan, b.source_T, b.tokens_T, 1.0, False, False)
        return [None, *({str(i): {"logprob": x, "rank": 1}} for i, x in zip(ids[1:], logp.tolist(), strict=True))]

    def completion(self, body: dict[str, Any]) -> dict[str, Any]:
        if body.get("model") not in (self.name, *self.adapters):
            raise Refused(404, f"The model `{body.get('model')}` does not exist.")
        if self.asleep:
            os._exit(78)  # a GPU's memory that is not there
        if len(body["prompt"]) + body["max_tokens"] > self.engine.max_length:  # type: ignore[operator]
            raise Refused(400, f"max_tokens={body['max_tokens']} cannot be greater than what max_model_len leaves")
        if not self.open.is_set():
            self.open.wait()
        if forced := [int(i) for i, bias in body.get("logit_bias", {}).items() if bias == 100.0]:
            ids = [*body["prompt"], forced[0]]
            told = self.prompt_logprobs(ids, body["model"])[-1][str(forced[0])]["logprob"] if self.raw else 0.0
            choice = {"token_ids": forced, "logprobs": {"token_logprobs": [told]}, "finish_reason": "length", "prompt_token_ids": body["prompt"]}
            return {"choices": [choice]}
        reply: queue.Queue[Any] = queue.Queue()
        self.waiting.put((body, reply))
        _, c = reply.get()
        time.sleep(self.latency_s * len(c.token_ids))
        choice = {
            "index": 0, "text": c.text, "finish_reason": c.finish, "token_ids": c.token_ids, "prompt_token_ids": body["prompt"],
            "logprobs": {"token_logprobs": c.logprobs, "tokens": c.token_ids} if "logprobs" in body else None,
            "prompt_logprobs": self.prompt_logprobs(body["prompt"], body["model"]) if "prompt_logprobs" in body else None,
        }  # fmt: skip
        return {"id": "cmpl-0", "object": "text_completion", "model": self.name, "choices": [choice]}

    # ------------------------------------------------------------ weights

    def init(self, info: dict[str, Any]) -> None:
        known = {"repair"} if self.backend == "llmrl_file" else {"repair", "leave", "host", "port", "name", "first", "size", "via", "limit_s"}
        if info.keys() - known:
            raise Refused(500, f"Worker failed with error 'Invalid init_info for Engine: unexpected keyword argument {(info.keys() - known)}'")
        self.repair = info.get("repair", True)
        if self.group is not None:
            self.group.close()
            self.group = None
        if info.get("host"):
            store = TCPStore(info["host"], info["port"], None, False, timedelta(seconds=info["limit_s"]), wait_for_workers=False)
            try:
                self.group = Group(store, info["name"], info["first"], info["size"], torch.device("cpu"), info["limit_s"], host_towards(f"tcp://{info['host']}"))
            except GroupFailed as failed:
                raise Refused(500, f"Worker failed with error '{failed}'") from None

    def tensors_of(self, info: dict[str, Any]) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        if path := info.get("path"):
            if not Path(path).is_file():
                self.active = False
                raise Refused(500, "Worker failed with error 'No such file or directory: <path>'")
            return load_file(path)
        try:
            if self.group is None:
                raise GroupFailed(f"{BROKEN} has no member here: this server was restarted")
            data = received(self.group, info["shapes"], info["dtypes"])
        except GroupFailed as failed:
            raise Refused(500, f"Worker failed with error '{failed}'") from None
        return dict(unpacked(data, **info))

    def update(self, info: dict[str, Any], fault: dict[str, Any]) -> None:
        if not self.active:
            raise Refused(500, "Worker failed with error 'start_weight_update must be called before update_weights.'")
        if "weights" in self.asleep:
            raise Refused(500, "Worker failed with error 'weights are asleep'")
        tensors = self.tensors_of(info)
        if fault.get("mode") == "cannot_load":
            raise Refused(500, "Worker failed with error 'out of memory'")
        model = self.policy.model
        with self.lock, torch.no_grad():
            if fault.get("mode") == "stale_head":  # vLLM on CPU keeps a packed copy of a tied embedding
                model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
            there = dict(model.named_parameters())
            self.use(self.name)
            for name, tensor in tensors.items():
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
        if body.get("restarted"):
            self.history, self.adapters, self.asleep, self.used, self.group = [], {}, set(), self.name, None
        self.raw = body.get("raw", self.raw)
        self.latency_s = body.get("latency_s", self.latency_s)
        if "mode" in body:
            self.faults.append(body)
        told = {"calls": dict(self.calls), "most": self.most, "label": self.label, "pid": os.getpid(), "repair": self.repair}
        return {**told, "history": self.history, "adapters": list(self.adapters), "asleep": sorted(self.asleep), "in_group": self.group is not None}

    def note(self, path: str) -> None:
        looks = ("/v1/models", "/weight_info", "/health", "/is_sleeping", "/is_paused", "/get_world_size")
        if path.partition("?")[0] not in looks and self.history[-1:] != [path]:
            self.history.append(path)

    def answer(self, path: str, body: dict[str, Any], fault: dict[str, Any]) -> Any:
        self.note(path)
        if not self.dev and path not in ("/v1/models", "/v1/completions", "/tokenize", "/health"):
            raise Refused(404, "Not Found")
        match path.partition("?")[0]:
            case "/v1/models":
                cards = [{"id": self.name, "max_model_len": self.engine.max_length, "root": self.name}]
                return {"object": "list", "data": [*cards, *({"id": name, "parent": self.name} for name in self.adapters)]}
            case "/tokenize":
                return {"tokens": self.policy.chat.tokenizer.encode(body["prompt"], add_special_tokens=False)}
            case "/get_world_size":
                return {"world_size": 1}
            case "/v1/load_lora_adapter":
                self.load_adapter(body["lora_name"], body["lora_path"])
                return "Success: LoRA adapter added successfully."
            case "/v1/unload_lora_adapter":
                with self.lock:
                    self.use(self.name)
                    del self.adapters[body["lora_name"]]
                return "Success: LoRA adapter removed successfully."
            case "/update_weight_version":
                self.label = body["new_version"]
            case "/sleep":
                self.asleep = {"weights", "kv_cache"}
            case "/wake_up":
                self.asleep -= {path.partition("?tags=")[2]} if "?" in path else self.asleep
            case "/is_paused":
                return {"is_paused": not self.open.is_set()}
            case "/is_sleeping":
                return {"is_sleeping": bool(self.asleep)}
            case "/v1/completions":
                return self.completion(body)
            case "/weight_info":
                return {"weight_version": self.label}
            case "/init_weight_transfer_engine":
                self.init(body["init_info"])
            case "/start_weight_update":
                self.start()
            case "/update_weights":
                self.update(body["update_info"], fault)
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
