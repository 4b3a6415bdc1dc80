"""Rollouts from vLLM servers over HTTP: token ids in, token ids and log-probs out, and the learner's weights sent to them.

Every server is a stock `vllm serve` (tested: 0.32), in an environment of its own: nothing of vLLM is imported here. Requests go to the
server with the fewest in flight. Nothing is taken from a reply that was not checked: lengths, finiteness, the limit on new tokens; and
after every completion the server must still say that it holds the weights of now, so one that was restarted, or that another run wrote
to, is found out. A server that fails is left out until it answers and holds them; its requests go to another one, or wait for it until
`deadline_s`, and then the run stops with its name. Completions carry the version of the weights that made them.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

from llmrl.learner import RunFailed
from llmrl.models import Policy
from llmrl.records import Completion, InputError, Request
from llmrl.vllm_client import WRONG, Server, Trouble
from llmrl.weights import WeightFiles

T = TypeVar("T")
log = logging.getLogger(__name__)
START = (
    "start it with VLLM_SERVER_DEV_MODE=1, --logprobs-mode processed_logprobs and --weight-transfer-config '{\"backend\": \"llmrl_file\"}' "
    "(on CPU --no-enable-chunked-prefill too), llmrl being installed beside it"
)


def vllm(
    *, servers: list[str], folder: str | None = None, in_flight: int = 128, request_s: float = 300.0, deadline_s: float = 600.0,
) -> Callable[[Policy], VLLMEngine]:  # fmt: skip
    """Engine over running vLLM servers.

    servers: their addresses, e.g. ["http://127.0.0.1:8000"]. folder: where weights are handed over; trainer and servers must see it (default:
    below /dev/shm, where there is one). in_flight: requests at a server at a time. request_s: seconds that one request may take. deadline_s:
    seconds without any progress after which the run stops: no completion from any server, or no server that takes weights.
    """
    if not servers or any(not s.startswith(("http://", "https://")) for s in servers):
        raise InputError(f'[engine] vllm: servers = {servers}; expected addresses, e.g. ["http://127.0.0.1:8000"]')
    if len({s.rstrip("/") for s in servers}) < len(servers):
        raise InputError(f"[engine] vllm: servers names one twice: {servers}")
    if in_flight < 1 or not 0 < request_s <= deadline_s:
        raise InputError(f"[engine] vllm: in_flight = {in_flight}, request_s = {request_s}, deadline_s = {deadline_s}; expected 0 < request_s <= deadline_s")
    return lambda policy: VLLMEngine(policy, servers, WeightFiles(folder), in_flight=in_flight, request_s=request_s, deadline_s=deadline_s)


class VLLMEngine:
    """See the module's docstring. `generate` may be called from any thread; `complete` from any event loop."""

    replica = True
    streams = True
    """Groups may be asked for one by one, and are answered as they finish."""

    def __init__(self, policy: Policy, servers: Sequence[str], files: WeightFiles, *, in_flight: int, request_s: float, deadline_s: float) -> None:
        vocabulary: int = policy.model.config.get_text_config().vocab_size
        self._checks: dict[str, Any] = {
            "stop_ids": sorted(policy.stop_ids), "banned_ids": policy.banned_ids, "vocabulary": vocabulary, "text": policy.chat.text,
        }  # fmt: skip
        self._proof_limit = 1e-3 if policy.model.dtype.itemsize >= 4 else 0.5
        self.files, self.in_flight, self.request_s, self.deadline_s = files, in_flight, request_s, deadline_s
        self.pause_s = min(1.0, request_s / 10)
        """Between two looks at a server that is down."""
        self.policy_version = 0
        self.servers: list[Server] = []
        self._updating, self._broken = False, ""
        self._proof: tuple[str | None, list[int], list[float]] = None, [], []
        self._mending: dict[Server, asyncio.Task[None]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="llmrl-vllm", daemon=True)
        self._thread.start()
        try:
            self._call(self._open(servers))
        except BaseException:
            self.close()
            raise
        self.max_length = min((s.max_length for s in self.servers if s.max_length), default=None)

    # ------------------------------------------------------------ the engine protocol

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion a request, in order. Raises RunFailed naming the servers when one could not be had."""
        return self._call(self._complete(requests))

    async def complete(self, requests: Sequence[Request]) -> list[Completion]:
        """`generate` for a coroutine: others may ask meanwhile."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._complete(requests), self._loop))

    def load_weights(self, version: int, weights: Callable[[], Any] | None) -> None:
        """Writes the learner's weights to the shared folder, one layer at a time; servers read a layer while the next is gathered.

        Collective: every rank goes through `weights`, whatever happens to the servers; the first one writes and talks to them. Waits for the
        completions that are being made. Raises RunFailed, on every rank, when no server holds the new weights by deadline_s.
        """
        assert weights is not None, "servers do not share the learner's memory"
        self._updating, self._broken = True, "an update of the weights broke off: nobody knows what the servers hold"
        try:
            error = self._failure(self._quiet())
            self.files.meet()  # no rank generates or mends from here on
            self.files.forget()
            stream = iter(weights())
            if self.files.writes and error is None:
                error = self._hand_over(version, stream)
            collections.deque(stream, maxlen=0)
            ok = self.files.meet(error is None)
            if ok:
                self.files.whole(version)
                self.policy_version, self._broken = version, ""
        finally:
            self._updating = False
            self._call(self._go_on())
        if ok and self.files.writes:
            error = self._failure(self._one_is_up())
        if not ok or not self.files.meet(error is None):
            raise error or RunFailed("vLLM: another rank could not hand over the weights; it says why")

    def fingerprint(self, ids: Sequence[int]) -> dict[str, list[float]]:
        """Server address -> log-probs (nats, temperature 1, no token banned) of ids[1:] given what stands before each; of all servers in use.

        The answer of the first is kept: a server that gets these weights later must give it too before it is used.
        """
        return self._call(self._fingerprints(list(ids)))

    def close(self) -> None:
        """Ends requests, connections and the thread, and deletes the weight files; the servers go on."""
        if self._thread.is_alive():
            with contextlib.suppress(Exception):
                asyncio.run_coroutine_threadsafe(self._shut(), self._loop).result(10)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(5)
            if not self._thread.is_alive():
                self._loop.close()
        self.files.close()

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # Ctrl-C: nobody waits for it any more
            raise

    def _failure(self, work: Coroutine[Any, Any, None]) -> RunFailed | None:
        try:
            self._call(work)
        except RunFailed as error:
            return error

    # ------------------------------------------------------------ start and end

    async def _open(self, urls: Sequence[str]) -> None:
        import httpx2

        # a server closes idle connections after 5 s (uvicorn): they are left before, or a request may meet the closing
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=2.0)
        self._http = httpx2.AsyncClient(timeout=httpx2.Timeout(self.request_s, connect=min(10.0, self.request_s)), limits=limits, trust_env=False)
        self._free, self._progress = asyncio.Condition(), time.monotonic()
        self.servers = [Server(url, self._http, self.request_s) for url in urls]
        for server in self.servers:
            try:
                await server.meet()
                server.first = await server.label()
                await server.prepare()
            except Trouble as trouble:
                raise InputError(f"[engine] vllm: {trouble}; {START}") from None
        if len({s.max_length for s in self.servers}) > 1:
            raise InputError(f"[engine] vllm: the servers differ in max_model_len: {[(s.url, s.max_length) for s in self.servers]}")

    async def _shut(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._http.aclose()

    # ------------------------------------------------------------ weights

    async def _quiet(self) -> None:
        """Ends the mending of servers and waits for the requests in flight."""
        mending = list(self._mending.values())
        for task in mending:
            task.cancel()
        await asyncio.gather(*mending, return_exceptions=True)
        end = time.monotonic() + self.deadline_s
        while any(s.busy for s in self.servers):
            if time.monotonic() > end:
                raise RunFailed(f"vLLM: requests in flight did not end within deadline_s = {self.deadline_s:g} s; {self._states()}")
            await self._wait(0.1)

    def _hand_over(self, version: int, stream: Iterable[tuple[str, Any]]) -> RunFailed | None:
        """All files written, and read by the servers that are up; what went wrong, if it did."""

        def send(ask: Callable[[Server], Coroutine[Any, Any, Any]]) -> Any:
            return asyncio.run_coroutine_threadsafe(self._each(ask), self._loop)

        sent = send(Server.begin_update)
        try:
            for path in self.files.write(version, stream):
                sent.result()
                sent = send(partial(Server.update, path=path))
            sent.result()
            self.files.whole(version)
            assert self.files.label is not None
            self._call(self._each(partial(Server.finish_update, label=self.files.label)))
        except RunFailed as error:
            sent.cancel()
            return error
        return None

    async def _each(self, ask: Callable[[Server], Coroutine[Any, Any, T]]) -> dict[Server, T]:
        """`ask` of every server that is up; one that fails is down from then on."""
        up = [s for s in self.servers if not s.down]
        told: dict[Server, T] = {}
        for server, answer in zip(up, await asyncio.gather(*(ask(s) for s in up), return_exceptions=True), strict=True):
            if isinstance(answer, Trouble) and answer.tries > 1:
                self._drop(server, str(answer))
            elif isinstance(answer, BaseException):
                raise RunFailed(f"vLLM: {answer}") if isinstance(answer, Trouble) else answer
            else:
                told[server] = answer
        return told

    async def _fingerprints(self, ids: list[int]) -> dict[str, list[float]]:
        async def ask(server: Server) -> list[float]:
            await server.holds(self._wanted(server))
            return await server.logprobs(ids)

        told: dict[Server, list[float]] = {}
        while not told or any(not s.down and s not in told for s in self.servers):  # one may have come back meanwhile
            await self._one_is_up()
            told = await self._each(ask)
        self._proof = self.files.label, ids, next(iter(told.values()))
        return {server.url: values for server, values in told.items()}

    # ------------------------------------------------------------ servers that were down

    def _wanted(self, server: Server) -> str:
        return self.files.label or server.first

    def _drop(self, server: Server, why: str) -> None:
        if not server.down:
            server.down = why
            log.warning("vLLM: left out until it is well again: %s", why)
            self._mend(server)

    def _mend(self, server: Server) -> None:
        if not self._updating and server not in self._mending:
            self._mending[server] = self._loop.create_task(self._again(server))
            self._mending[server].add_done_callback(lambda _: self._mending.pop(server, None))

    async def _go_on(self) -> None:
        self._progress = time.monotonic()
        for server in self.servers:
            server.lost = False
            if server.down:
                self._mend(server)
        async with self._free:
            self._free.notify_all()

    async def _again(self, server: Server) -> None:
        """A server that was down: waits for it, sends it the weights of now where it has others (a restarted one holds the first ones)."""
        refused = 0
        while refused < WRONG:
            await asyncio.sleep(self.pause_s)
            weights = False
            try:
                await server.meet()
                if (found := await server.label()) != self._wanted(server):
                    if found not in ("default", server.first) and not found.startswith(self.files.run):
                        refused = WRONG
                        raise Trouble(f"{server.url} holds weights {found!r}: another run uses it")
                    with self.files.turn(server.url) as mine:
                        weights = mine
                        if mine:
                            await self._send_all(server)
                if await server.label() == self._wanted(server):  # else another rank is sending
                    await server.resume()
                    weights = True
                    await self._prove(server)
                    log.warning("vLLM: %s is used again", server.url)
                    server.down = ""
                    break
            except (Trouble, OSError) as trouble:
                server.down = f"{server.url}: {trouble}" if isinstance(trouble, OSError) else str(trouble)
                refused += weights and getattr(trouble, "answered", True)
        server.lost = bool(server.down)
        async with self._free:
            self._free.notify_all()

    async def _send_all(self, server: Server) -> None:
        if self.files.label is None:
            raise Trouble(f"{server.url} holds other weights than it did when this run began")
        server.sent += 1
        await server.prepare()
        await server.begin_update()
        for path in self.files.paths():
            await server.update(path)
        await server.finish_update(self.files.label)

    async def _prove(self, server: Server) -> None:
        """Its log-probs of the text of the last fingerprint are those that were found good."""
        label, ids, known = self._proof
        if label == self.files.label and ids:
            gap = max((abs(a - b) for a, b in zip(known, await server.logprobs(ids), strict=True)), default=0.0)
            if not gap <= self._proof_limit:
                raise Trouble(f"{server.url} got the weights again, and its log-probs of a fixed text are off by {gap:.4g} nats")

    async def _one_is_up(self) -> None:
        end = time.monotonic() + self.deadline_s
        while all(s.down for s in self.servers):
            if time.monotonic() > end or all(s.lost for s in self.servers):
                raise RunFailed(f"vLLM: no server holds the weights of version {self.policy_version}; {self._states()}")
            await self._wait(0.2)

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
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _one(self, request: Request) -> Completion:
        begun, last, failures = time.monotonic(), "no server was free", collections.Counter[int]()
        while True:
            server = await self._server(begun, last)
            sent = server.sent
            try:
                done = await server.complete(request, self.policy_version, **self._checks)
                await server.holds(self._wanted(server))
                if server.sent == sent:
                    self._progress = time.monotonic()
                    return done
                last = f"{server.url} got weights again while it answered"
            except Trouble as trouble:
                last = str(trouble)
                failures[trouble.tries] += 1
                if failures[trouble.tries] >= trouble.tries:
                    raise RunFailed(f"vLLM: {last}" + (f" (failure {trouble.tries} of one request)" if trouble.tries > 1 else "")) from None
                self._drop(server, last)
            finally:
                server.busy -= 1
                async with self._free:
                    self._free.notify()

    async def _server(self, begun: float, last: str) -> Server:
        """The least busy server that is up and has room. Waits for one while others make progress, and then until deadline_s."""
        while True:
            if not self._updating:
                if self._broken:
                    raise RunFailed(f"vLLM: {self._broken}")
                free = [s for s in self.servers if not s.down and s.busy < self.in_flight]
                if free:
                    server = min(free, key=lambda s: (s.busy, s.done))
                    server.busy += 1
                    server.done += 1
                    return server
                late = max(begun, self._progress) + self.deadline_s < time.monotonic()
                if late or all(s.lost for s in self.servers):
                    why = f"no completion within deadline_s = {self.deadline_s:g} s" if late else "no server can be used"
                    raise RunFailed(f"vLLM: {why}; the last failure: {last}; {self._states()}")
            await self._wait(min(1.0, self.deadline_s / 10))

    async def _wait(self, seconds: float) -> None:
        """Until something became free, or for that long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds), self._free:
                await self._free.wait()

    def _states(self) -> str:
        return "servers: " + "; ".join(s.down or f"{s.url}: in use" for s in self.servers)
