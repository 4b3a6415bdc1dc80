"""Rollouts from vLLM servers over HTTP: token ids in, token ids and log-probs out, and the learner's weights sent to them.

Every server is a stock `vllm serve` (tested: 0.32), in an environment of its own: nothing of vLLM is imported here. Requests go to the
server with the fewest in flight. A server that does not answer is left out until it is back with the right weights; its requests go to
another one, or wait for it until `deadline_s`, and then the run stops with its name. Nothing is taken from a reply that was not checked:
lengths, finiteness, the limit on new tokens. Completions carry the version of the weights that made them.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from llmrl.learner import RunFailed
from llmrl.models import Policy
from llmrl.records import Completion, InputError, Request
from llmrl.weights import WeightFiles

T = TypeVar("T")
_BACKEND = "llmrl_file"
START = "start it with VLLM_SERVER_DEV_MODE=1 and --weight-transfer-config '{\"backend\": \"llmrl_file\"}', llmrl being installed beside it"
_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})


def vllm(
    *, servers: list[str], folder: str = "/dev/shm/llmrl-weights", in_flight: int = 128, request_s: float = 300.0, deadline_s: float = 600.0,
) -> Callable[[Policy], VLLMEngine]:  # fmt: skip
    """Engine over running vLLM servers.

    servers: their addresses, e.g. ["http://127.0.0.1:8000"]. folder: where weights are handed over; trainer and servers must see it.
    in_flight: requests at a server at a time. request_s: seconds that one request may take. deadline_s: seconds after which a request that no
    server could answer, or a server that will not take weights, ends the run.
    """
    if not servers or any(not s.startswith(("http://", "https://")) for s in servers):
        raise InputError(f'[engine] vllm: servers = {servers}; expected addresses, e.g. ["http://127.0.0.1:8000"]')
    if len(set(servers)) < len(servers):
        raise InputError(f"[engine] vllm: servers names one twice: {servers}")
    if in_flight < 1 or not 0 < request_s <= deadline_s:
        raise InputError(f"[engine] vllm: in_flight = {in_flight}, request_s = {request_s}, deadline_s = {deadline_s}; expected 0 < request_s <= deadline_s")
    return lambda policy: VLLMEngine(policy, servers, WeightFiles(folder), in_flight=in_flight, request_s=request_s, deadline_s=deadline_s)


class Trouble(Exception):
    """A server did not do what it was asked; `lasting`: asking again, or another one, will not help."""

    def __init__(self, text: str, *, lasting: bool = False) -> None:
        super().__init__(text)
        self.lasting = lasting


@dataclass(eq=False)
class _Server:
    url: str
    model: str = ""
    max_length: int | None = None
    busy: int = 0
    version: int = -1
    """Of the weights it holds, as far as we know; -1 = not known."""
    down: str = ""
    """Why it is not used now."""
    done: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while its weights change."""


class VLLMEngine:
    """See the module's docstring. `generate` may be called from any thread; `complete` from any event loop."""

    replica = True
    streams = True
    """Groups may be asked for one by one, and are answered as they finish."""

    def __init__(self, policy: Policy, servers: Sequence[str], files: WeightFiles, *, in_flight: int, request_s: float, deadline_s: float) -> None:
        self.stop_ids, self.banned_ids, self.text = sorted(policy.stop_ids), policy.banned_ids, policy.chat.text
        self.tokenizer_size = len(policy.chat.tokenizer)
        self.files, self.in_flight, self.request_s, self.deadline_s = files, in_flight, request_s, deadline_s
        self.policy_version = 0
        self.servers = [_Server(url.rstrip("/")) for url in servers]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="llmrl-vllm", daemon=True)
        self._thread.start()
        try:
            self._call(self._open())
        except BaseException:
            self.close()
            raise
        lengths = [s.max_length for s in self.servers if s.max_length]
        self.max_length = min(lengths) if lengths else None

    # ------------------------------------------------------------ the engine protocol

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion a request, in order. Raises RunFailed naming the server when one could not be had within deadline_s."""
        return self._call(self._complete(requests))

    async def complete(self, requests: Sequence[Request]) -> list[Completion]:
        """`generate` for a coroutine: others may ask meanwhile."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._complete(requests), self._loop))

    def load_weights(self, version: int, weights: Callable[[], Any] | None) -> None:
        """Writes the learner's weights to the shared folder, one layer at a time, and has every server read each while the next is gathered.

        Collective: every rank goes through `weights`; the first one writes and talks to the servers.
        """
        assert weights is not None, "servers do not share the learner's memory"
        if self.files.writes:
            self._call(self._begin_update())
            for path in self.files.write(version, weights()):
                self._call(self._each(lambda s, path=path: self._post(s, "/update_weights", {"update_info": {"path": str(path)}})))
            self._call(self._finish_update(version))
            self.files.forget_before(version)
        else:
            for _ in weights():
                pass
        self.files.wait_for_ranks()
        self.policy_version = version
        for server in self.servers:
            server.version = version

    def fingerprint(self, ids: Sequence[int]) -> dict[str, list[float]]:
        """Server address -> log-probs (nats, temperature 1, no token banned) of ids[1:] given what stands before each."""
        return dict(zip([s.url for s in self.servers if not s.down], self._call(self._fingerprints(list(ids))), strict=True))

    def close(self) -> None:
        """Ends the connections and the thread; the servers go on."""
        if self._thread.is_alive():
            with contextlib.suppress(Exception):
                asyncio.run_coroutine_threadsafe(self._shut(), self._loop).result(5)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(5)

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    # ------------------------------------------------------------ start and weights

    async def _open(self) -> None:
        import httpx2

        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        self._http = httpx2.AsyncClient(timeout=httpx2.Timeout(self.request_s, connect=10.0), limits=limits, trust_env=False)
        self._tasks: set[asyncio.Task[None]] = set()
        self._free = asyncio.Condition()
        for server in self.servers:
            try:
                await self._look(server)
                await self._post(server, "/init_weight_transfer_engine", {"init_info": {}})
            except Trouble as trouble:
                raise InputError(f"[engine] vllm: {trouble}; {START}") from None
        named = {s.model for s in self.servers}
        if len({s.max_length for s in self.servers}) > 1:
            raise InputError(f"[engine] vllm: the servers differ in max_model_len: {[(s.url, s.max_length) for s in self.servers]} ({named})")

    async def _look(self, server: _Server) -> None:
        """What model it serves."""
        models = (await self._get(server, "/v1/models"))["data"]
        server.model, server.max_length = models[0]["id"], models[0].get("max_model_len")

    async def _shut(self) -> None:
        for task in self._tasks:
            task.cancel()
        await self._http.aclose()

    async def _each(self, ask: Callable[[_Server], Coroutine[Any, Any, Any]]) -> list[Any]:
        """`ask` of every server that is up; one that fails is down from then on, and gets the weights when it is back."""
        up = [s for s in self.servers if not s.down]
        found = await asyncio.gather(*(ask(s) for s in up), return_exceptions=True)
        for server, answer in zip(up, found, strict=True):
            if isinstance(answer, Trouble) and not answer.lasting and len(self.servers) > 1:
                self._drop(server, str(answer))
            elif isinstance(answer, BaseException):
                raise RunFailed(f"vLLM: {answer}") if isinstance(answer, Trouble) else answer
        if not any(not s.down for s in self.servers):
            raise RunFailed("vLLM: no server is left: " + "; ".join(f"{s.url}: {s.down}" for s in self.servers))
        return [a for a in found if not isinstance(a, BaseException)]

    async def _begin_update(self) -> None:
        for server in self.servers:
            if not server.down:
                await server.lock.acquire()
        await self._each(lambda s: self._post(s, "/start_weight_update", {}))

    async def _finish_update(self, version: int) -> None:
        async def finish(server: _Server) -> None:
            await self._post(server, "/finish_weight_update", {"weight_version": str(version)})
            await self._post(server, "/reset_prefix_cache", None)

        await self._each(finish)
        for server in self.servers:
            if server.lock.locked():
                server.lock.release()

    async def _again(self, server: _Server) -> None:
        """A server that was down: waits for it, sends it the weights of now (a restarted one holds the first ones), uses it again."""
        while True:
            await asyncio.sleep(1.0)
            with contextlib.suppress(Trouble):
                await self._look(server)
                async with server.lock:
                    with contextlib.suppress(Trouble):  # it may have been initialised before
                        await self._post(server, "/init_weight_transfer_engine", {"init_info": {}})
                    version = self.files.version
                    if version is not None:
                        await self._post(server, "/start_weight_update", {})
                        for path in self.files.paths():
                            await self._post(server, "/update_weights", {"update_info": {"path": str(path)}})
                        await self._post(server, "/finish_weight_update", {"weight_version": str(version)})
                        await self._post(server, "/reset_prefix_cache", None)
                server.down, server.busy = "", 0
                async with self._free:
                    self._free.notify_all()
                return

    def _drop(self, server: _Server, why: str) -> None:
        if not server.down:
            server.down = why
            task = self._loop.create_task(self._again(server))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _fingerprints(self, ids: list[int]) -> list[list[float]]:
        async def ask(server: _Server) -> list[float]:
            body = {"model": server.model, "prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0, "return_token_ids": True}
            choice = _choice(server, await self._post(server, "/v1/completions", body))
            rows = choice.get("prompt_logprobs") or []
            if len(rows) != len(ids):
                raise Trouble(f"{server.url} told {len(rows)} log-probs of a probe of {len(ids)} tokens", lasting=True)
            return [float(row[str(token)]["logprob"]) for row, token in zip(rows[1:], ids[1:], strict=True)]

        return await self._each(ask)

    # ------------------------------------------------------------ completions

    async def _complete(self, requests: Sequence[Request]) -> list[Completion]:
        for r in requests:
            if not r.context_ids:
                raise InputError("a request has an empty context: the first token needs something to be predicted from")
            if self.max_length and len(r.context_ids) + r.sampling.max_new_tokens > self.max_length:
                raise InputError(
                    f"a context of {len(r.context_ids)} tokens and max_new_tokens = {r.sampling.max_new_tokens} exceed the servers' max_model_len = "
                    f"{self.max_length}: start them with a larger one, or lower rollout.max_new_tokens or data.max_prompt_tokens"
                )
        tasks = [asyncio.ensure_future(self._one(r)) for r in requests]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    async def _one(self, request: Request) -> Completion:
        end, last = time.monotonic() + self.deadline_s, "no server was free"
        while True:
            server = await self._server(end, last)
            try:
                return await self._ask(server, request)
            except Trouble as trouble:
                if trouble.lasting:
                    raise RunFailed(f"vLLM: {trouble}") from None
                last = str(trouble)
                self._drop(server, last)
            finally:
                server.busy -= 1
                async with self._free:
                    self._free.notify()

    async def _server(self, end: float, last: str) -> _Server:
        """The least busy server that is up and has room; waits for one until `end`."""
        while True:
            free = [s for s in self.servers if not s.down and s.busy < self.in_flight and not s.lock.locked()]
            if free:
                server = min(free, key=lambda s: (s.busy, s.done))
                server.busy += 1
                server.done += 1
                return server
            left = end - time.monotonic()
            if left <= 0:
                states = "; ".join(f"{s.url}: {s.down or 'busy'}" for s in self.servers)
                raise RunFailed(f"vLLM: no completion within deadline_s = {self.deadline_s:g} s; the last failure: {last}; servers: {states}")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left, 1.0)), self._free:
                    await self._free.wait()

    async def _ask(self, server: _Server, request: Request) -> Completion:
        how, version = request.sampling, self.policy_version
        body: dict[str, Any] = {
            "model": server.model, "prompt": list(request.context_ids), "max_tokens": how.max_new_tokens, "temperature": how.temperature,
            "top_p": how.top_p, "top_k": how.top_k or -1, "min_p": how.min_p, "seed": _seed(request), "logprobs": 0, "return_token_ids": True,
            "stop_token_ids": self.stop_ids, "logit_bias": {str(i): -100.0 for i in self.banned_ids},
        }  # fmt: skip
        if how.stop:
            body |= {"stop": list(how.stop), "include_stop_str_in_output": True}
        choice = _choice(server, await self._post(server, "/v1/completions", body))
        ids, told, finish = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs"), choice.get("finish_reason")
        if choice.get("prompt_token_ids") not in (None, list(request.context_ids)):
            raise Trouble(f"{server.url} answered for another prompt than the one it was given", lasting=True)
        if not isinstance(ids, list) or not isinstance(told, list) or len(ids) != len(told) or not ids:
            n = len(ids) if isinstance(ids, list) else None, len(told) if isinstance(told, list) else None
            raise Trouble(f"{server.url} answered {n[0]} token ids and {n[1]} log-probs")
        if len(ids) > how.max_new_tokens or finish not in ("stop", "length"):
            raise Trouble(f"{server.url} answered {len(ids)} tokens of at most {how.max_new_tokens}, finish_reason {finish!r}")
        if not all(isinstance(x, int | float) and math.isfinite(x) and x <= 1e-3 for x in told) or not all(type(i) is int and i >= 0 for i in ids):
            raise Trouble(f"{server.url} answered a log-prob or a token id that is none: {[x for x in told if not math.isfinite(x)][:3]}")
        logps = [0.0] * len(ids) if how.temperature == 0 else [min(0.0, float(x)) for x in told]
        return Completion(ids, logps, finish, version, self.text(ids))

    # ------------------------------------------------------------ HTTP

    async def _post(self, server: _Server, path: str, body: dict[str, Any] | None) -> Any:
        return await self._http_call(server, "POST", path, body)

    async def _get(self, server: _Server, path: str) -> Any:
        return await self._http_call(server, "GET", path, None)

    async def _http_call(self, server: _Server, method: str, path: str, body: dict[str, Any] | None) -> Any:
        """The JSON answer, or {} where the body is empty. Trouble: no answer within request_s, not 2xx (with its body), no JSON."""
        import httpx2

        try:
            async with asyncio.timeout(self.request_s):
                response = await self._http.request(method, server.url + path, json=body)
        except TimeoutError:
            raise Trouble(f"{server.url}{path}: no answer within request_s = {self.request_s:g} s") from None
        except httpx2.RequestError as error:
            raise Trouble(f"{server.url}{path}: {type(error).__name__} {error}".rstrip()) from None
        if not response.is_success:
            text = " ".join(response.text.split())[:600]
            raise Trouble(f"{server.url}{path}: HTTP {response.status_code}: {text}", lasting=response.status_code not in _RETRIED)
        if not response.content:
            return {}
        try:
            return response.json()
        except ValueError:
            raise Trouble(f"{server.url}{path}: an answer that is no JSON: {response.text[:200]!r}") from None


def _choice(server: _Server, answer: Any) -> dict[str, Any]:
    try:
        (choice,) = answer["choices"]
        return dict(choice)
    except (LookupError, TypeError, ValueError):
        raise Trouble(f"{server.url}: an answer that is no completion: {str(answer)[:300]}") from None


def _seed(request: Request) -> int:
    """63 bits of a hash of the request's seed: the same request draws the same tokens on any server."""
    text = "\x1f".join(f"{type(k).__name__}:{k}" for k in request.seed)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
