"""The vLLM servers of a run: which of them can be used, asking one of them, and mending those that were down. The engine is vllm_engine.py.

Requests go to the server with the fewest in flight. After every answer the server must still say that it holds the weights of now, so one
that was restarted, or that another run wrote to, is found out. A server that fails is left out until it answers and holds them; its requests
go to another one, or wait for it until `deadline_s`, and then the run stops with its name.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from llmrl.learner import RunFailed
from llmrl.records import InputError
from llmrl.vllm_client import ONCE, WRONG, Server, Trouble
from llmrl.vllm_routes import Asks, FileRoute
from llmrl.weights import WeightFiles

T = TypeVar("T")
log = logging.getLogger(__name__)
START = (
    "start it with VLLM_SERVER_DEV_MODE=1, --logprobs-mode processed_logprobs and --weight-transfer-config '{\"backend\": \"llmrl_broadcast\"}' "
    "(on CPU --no-enable-chunked-prefill too), llmrl being installed beside it"
)
START_SAMPLING = "start it with --logprobs-mode processed_logprobs (on CPU --no-enable-chunked-prefill too)"


class Fleet:
    """See the module's docstring. Everything that is `async` runs in one thread's event loop; the rest may be called from any other."""

    def __init__(
        self, files: WeightFiles, probe_tokens: Sequence[int], *, in_flight: int, request_s: float, deadline_s: float, trains: bool, colocated: bool
    ) -> None:
        self.files, self.probe_tokens, self.in_flight, self.request_s, self.deadline_s = files, probe_tokens, in_flight, request_s, deadline_s
        self.trains, self.colocated = trains, colocated
        self.pause_s = min(1.0, request_s / 10)
        """Between two looks at a server that is down."""
        self.policy_version = 0
        self.servers: list[Server] = []
        self.route: FileRoute
        self._updating, self._asleep, self._broken = False, False, ""
        self._proof: tuple[str | None, list[int], list[float], tuple[float, float]] = None, [], [], (0.0, 0.0)
        self._mending: dict[Server, asyncio.Task[None]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="llmrl-vllm", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------ from other threads

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # Ctrl-C: nobody waits for it any more
            raise

    def _failure(self, work: Coroutine[Any, Any, Any]) -> RunFailed | None:
        try:
            self._call(work)
        except RunFailed as error:
            return error

    @property
    def up(self) -> list[Server]:
        """The servers that take part in an update."""
        return [s for s in self.servers if not s.down]

    def each(self, ask: Asks) -> Future[Any]:
        """See vllm_routes.Crew."""
        return asyncio.run_coroutine_threadsafe(self._each(ask), self._loop)

    def ask(self, ask: Asks) -> dict[Server, Future[Any]]:
        """See vllm_routes.Crew."""
        return {s: asyncio.run_coroutine_threadsafe(ask(s), self._loop) for s in self.up}

    def drop(self, server: Server, why: str) -> None:
        """See vllm_routes.Crew."""

        async def now() -> None:
            self._drop(server, why)

        self._call(now())

    def end(self) -> None:
        """Ends requests, connections and the thread; the servers go on."""
        if self._thread.is_alive():
            with contextlib.suppress(Exception):
                asyncio.run_coroutine_threadsafe(self._shut(), self._loop).result(10)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(5)
            if not self._thread.is_alive():
                self._loop.close()

    # ------------------------------------------------------------ start and end

    async def _open(self, urls: Sequence[str], adapters: bool) -> None:
        import httpx2

        # a server closes idle connections after 5 s (uvicorn): they are left before, or a request may meet the closing
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=2.0)
        self._http = httpx2.AsyncClient(timeout=httpx2.Timeout(self.request_s, connect=min(10.0, self.request_s)), limits=limits, trust_env=False)
        self._free, self._progress = asyncio.Condition(), time.monotonic()
        self.servers = [Server(url, self._http, self.request_s) for url in urls]
        for server in self.servers:
            try:
                await server.meet()
                if self.trains:
                    server.first = await server.label()
                    if self.colocated:
                        await server.rouse()
                    await server.probe_routes(adapters)
                else:
                    server.first = await self._label_if_any(server)
                if not self.trains or not await server.is_paused():
                    await server.check_logprobs(self.probe_tokens)  # else before its first answer
            except Trouble as trouble:
                mend = "" if "start it with" in str(trouble) else f"; {START if self.trains else START_SAMPLING}"
                raise InputError(f"[engine] vllm: {trouble}{mend}") from None
        if len({s.max_length for s in self.servers}) > 1:
            raise InputError(f"[engine] vllm: the servers differ in max_model_len: {[(s.url, s.max_length) for s in self.servers]}")

    @staticmethod
    async def _label_if_any(server: Server) -> str:
        try:
            return await server.label()
        except Trouble as trouble:
            if not trouble.answered or trouble.tries != ONCE:
                raise
            server.labelled = False
            return ""

    async def _shut(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._http.aclose()

    # ------------------------------------------------------------ updates

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

    async def _invite(self) -> None:
        """Before an update: servers that were down and answer now take part, where nothing else would bring them the weights."""

        async def one(server: Server) -> None:
            with contextlib.suppress(Trouble):
                await server.meet()
                self._ours(server, await server.label())
                await server.probe_routes(False)
                server.checked, server.down = False, ""

        await asyncio.gather(*(one(s) for s in self.servers if s.down))

    def _ours(self, server: Server, label: str) -> None:
        """Trouble where the weights that it says it holds are another run's."""
        if label not in ("default", server.first) and not label.startswith(self.files.run):
            raise Trouble(f"{server.url} holds weights {label!r}: another run uses it", ONCE)

    async def _each(self, ask: Callable[[Server], Coroutine[Any, Any, T]]) -> dict[Server, T]:
        """`ask` of every server that is up; one that fails is down from then on."""
        up = self.up
        told: dict[Server, T] = {}
        for server, answer in zip(up, await asyncio.gather(*(ask(s) for s in up), return_exceptions=True), strict=True):
            if isinstance(answer, Trouble) and answer.tries > 1:
                self._drop(server, str(answer))
            elif isinstance(answer, BaseException):
                raise RunFailed(f"vLLM: {answer}") if isinstance(answer, Trouble) else answer
            else:
                told[server] = answer
        return told

    async def _back_to_work(self) -> None:
        """After an update."""
        if self._asleep:
            await self._each(partial(Server.wake, tag="kv_cache"))
        await self._each(Server.resume)

    async def _go_on(self) -> None:
        self._progress = time.monotonic()
        for server in self.servers:
            server.lost = False
            if server.down:
                self._mend(server)
        async with self._free:
            self._free.notify_all()

    async def _one_is_up(self) -> None:
        end = time.monotonic() + self.deadline_s
        while all(s.down for s in self.servers):
            if time.monotonic() > end or all(s.lost for s in self.servers):
                raise RunFailed(f"vLLM: no server holds the weights of version {self.policy_version}; {self._states()}")
            await self._wait(0.2)

    # ------------------------------------------------------------ servers that were down

    def _wanted(self, server: Server) -> str:
        return self.files.label or server.first

    def _drop(self, server: Server, why: str) -> None:
        if not server.down:
            server.down = why
            log.warning("vLLM: left out until it is well again: %s", why)
            self._mend(server)

    def _mend(self, server: Server) -> None:
        if not (self._updating or self._asleep) and server not in self._mending:
            self._mending[server] = self._loop.create_task(self._again(server))
            self._mending[server].add_done_callback(lambda _: self._mending.pop(server, None))

    async def _again(self, server: Server) -> None:
        """A server that was down: waits for it, sends it the weights of now where it has others (a restarted one holds the first ones)."""
        refused = 0
        while refused < WRONG:
            await asyncio.sleep(self.pause_s)
            weights = False
            try:
                await server.meet()
                if (found := await server.label()) != self._wanted(server):
                    self._ours(server, found)
                    with self.files.turn(server.url) as mine:
                        weights = mine
                        if mine:
                            server.sent += 1
                            await self.route.mend(server)
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
                if getattr(trouble, "tries", 0) == ONCE:
                    refused = WRONG
        server.lost = bool(server.down)
        async with self._free:
            self._free.notify_all()

    async def _prove(self, server: Server) -> None:
        """Its log-probs of the text of the last fingerprint are those that were found good."""
        await server.check_logprobs(self.probe_tokens)
        label, ids, known, (limit, mean_limit) = self._proof
        if label == self.files.label and len(ids) > 1:
            gaps = [abs(a - b) for a, b in zip(known, await server.logprobs(ids), strict=True)]
            if not (max(gaps) <= limit and sum(gaps) / len(gaps) <= mean_limit):
                raise Trouble(
                    f"{server.url} got the weights again, and its log-probs of a fixed text are off by {max(gaps):.4g} nats (limit {limit:g}, "
                    f"checks.max_fingerprint_gap; mean {sum(gaps) / len(gaps):.3g})"
                )

    # ------------------------------------------------------------ requests

    async def _asked(self, ask: Callable[[Server], Coroutine[Any, Any, T]]) -> T:
        """The answer of the server with the fewest requests that held the weights of now; of another one, or after a while, where it fails."""
        begun, last, failures = time.monotonic(), "no server was free", collections.Counter[int]()
        while True:
            server = await self._server(begun, last)
            sent = server.sent
            try:
                if not server.checked:
                    await server.check_logprobs(self.probe_tokens)
                done = await ask(server)
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
                if self._broken or self._asleep:
                    raise RunFailed(f"vLLM: {self._broken or 'the servers sleep until they get the next weights'}")
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


async def all_of(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results, in order; where one fails the others are ended."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
