"""Rollouts from vLLM servers over HTTP: token ids in, token ids and log-probs out, and the learner's weights sent to them.

Every server is a stock `vllm serve` (tested: 0.32), in an environment of its own: nothing of vLLM is imported here. Nothing is taken from a
reply that was not checked (vllm_client.py); servers that fail, and requests that they had, are the fleet's (vllm_fleet.py); how weights
travel is the route's (vllm_routes.py). Completions carry the version of the weights that made them.
"""

from __future__ import annotations

import asyncio
import collections
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

from llmrl.learner import RunFailed
from llmrl.models import Policy
from llmrl.records import Completion, InputError, Request
from llmrl.vllm_client import ADAPTER, Server
from llmrl.vllm_fleet import Fleet, all_of
from llmrl.vllm_routes import Again, choose, make_route
from llmrl.weights import WeightFiles

log = logging.getLogger(__name__)
ROUTES = ("file", "broadcast", "adapter")


def vllm(
    *, servers: list[str], folder: str | None = None, in_flight: int = 128, request_s: float = 300.0, deadline_s: float = 600.0,
    transfer: Literal["auto", "file", "broadcast", "adapter"] = "auto", keep: bool = True, colocated: bool = False, sleep_level: Literal[1, 2] = 1,
) -> Callable[[Policy], VLLMEngine]:  # fmt: skip
    """Engine over running vLLM servers.

    servers: their addresses, e.g. ["http://127.0.0.1:8000"]. folder: where weights are handed over; trainer and servers must see it (default:
    below /dev/shm, where there is one). in_flight: requests at a server at a time. request_s: seconds that one request may take. deadline_s:
    seconds without any progress after which the run stops: no completion from any server, or no server that takes weights. transfer: how
    weights travel (vllm_routes.py); auto = adapters alone where the servers have LoRA, else broadcast where they have llmrl_broadcast, else
    files. keep: under broadcast also write files, so that a server that comes back between updates is used at once. colocated: the servers
    are on the trainer's GPU and sleep while it learns (start them with --enable-sleep-mode). sleep_level: 1 keeps their weights in the
    computer's memory meanwhile, 2 drops them, since they get new ones (not with adapters).
    """
    if not servers or any(not s.startswith(("http://", "https://")) for s in servers):
        raise InputError(f'[engine] vllm: servers = {servers}; expected addresses, e.g. ["http://127.0.0.1:8000"]')
    if len({s.rstrip("/") for s in servers}) < len(servers):
        raise InputError(f"[engine] vllm: servers names one twice: {servers}")
    if in_flight < 1 or not 0 < request_s <= deadline_s:
        raise InputError(f"[engine] vllm: in_flight = {in_flight}, request_s = {request_s}, deadline_s = {deadline_s}; expected 0 < request_s <= deadline_s")
    if transfer not in ("auto", *ROUTES) or sleep_level not in (1, 2):
        raise InputError(f"[engine] vllm: transfer = {transfer!r}, sleep_level = {sleep_level}; expected auto, {', '.join(ROUTES)}, and 1 or 2")
    how: dict[str, Any] = {"in_flight": in_flight, "request_s": request_s, "deadline_s": deadline_s, "transfer": transfer, "keep": keep}
    return lambda policy: VLLMEngine(policy, servers, WeightFiles(folder), colocated=colocated, sleep_level=sleep_level, **how)


class VLLMEngine(Fleet):
    """See the module's docstring. `generate` may be called from any thread; `complete` from any event loop."""

    replica = True
    streams = True
    """Groups may be asked for one by one, and are answered as they finish."""

    def __init__(
        self, policy: Policy, servers: Sequence[str], files: WeightFiles, *, in_flight: int = 128, request_s: float = 300.0, deadline_s: float = 600.0,
        transfer: str = "auto", keep: bool = True, colocated: bool = False, sleep_level: int = 1, trains: bool = True,
    ) -> None:  # fmt: skip
        vocabulary: int = policy.model.config.get_text_config().vocab_size
        self._checks: dict[str, Any] = {
            "stop_ids": sorted(policy.stop_ids), "banned_ids": policy.banned_ids, "vocabulary": vocabulary, "text": policy.chat.text,
        }  # fmt: skip
        probe = [i for i in range(vocabulary) if i not in policy.banned_ids and i not in policy.stop_ids][:2]
        super().__init__(files, probe, in_flight=in_flight, request_s=request_s, deadline_s=deadline_s, trains=trains, colocated=colocated)
        self.sleep_level = sleep_level
        self.route = make_route("file", files, self, policy, limit_s=request_s, keep=keep)
        try:
            self._call(self._open(servers, policy.lora and trains))
            name = choose(transfer, self.servers, policy, colocated=colocated) if trains else "file"
            name = ROUTES[files.agree([ROUTES.index(name)])[0]]
            self.route = make_route(name, files, self, policy, limit_s=request_s, keep=keep)
            if name == "adapter" and colocated and sleep_level == 2:
                raise InputError("[engine] vllm: sleep_level = 2 drops the base model's weights, and with adapters nothing brings them back; take 1")
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

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
        """Log-probs (nats, temperature 1) of each pair's second ids, each given the first ids and what stands before it.

        No token is banned here, as in the fingerprint: tokens that are never sampled are part of the softmax, so a value can lie a little
        below what generating the same token would tell. Retried, spread and given up as completions are.
        """
        return self._call(self._scores(pairs))

    def load_weights(self, version: int, weights: Callable[[], Any] | None) -> None:
        """Hands the learner's weights to the servers, by the route that was chosen at start; a layer travels while the next is gathered.

        Collective: every rank goes through `weights`, whatever happens to the servers, and again where a route lost them; the first one talks
        to them. Waits for the completions that are being made. Servers that sleep are woken. Raises RunFailed, on every rank, when no server
        holds the new weights by deadline_s.
        """
        assert weights is not None, "servers do not share the learner's memory"
        self._updating, self._broken = True, "an update of the weights broke off: nobody knows what the servers hold"
        try:
            error = self._failure(self._quiet())
            self.files.meet()  # no rank generates or mends from here on
            self.files.forget()
            if self._asleep and self.files.writes and error is None:
                error = self._failure(self._each(partial(Server.wake, tag="weights")))
            again = True
            while again:
                stream, again = iter(self.route.outgoing(weights)), False
                if self.files.writes and error is None:
                    try:
                        if not self.route.keeps:
                            self._call(self._invite())
                        self.route.hand_over(version, stream)
                    except Again as lost:
                        again = True
                        log.warning("vLLM: the weights are sent once more: %s", lost)
                    except RunFailed as failed:
                        error = failed
                collections.deque(stream, maxlen=0)
                again = not self.files.meet(not again)
            if self.files.writes and error is None:
                error = self._failure(self._back_to_work())
            ok = self.files.meet(error is None)
            if ok:
                self.files.whole(version)
                for server in self.servers:
                    server.adapter = f"{ADAPTER}{self.files.label}" if self.route.name == "adapter" else ""
                self.policy_version, self._broken, self._asleep = version, "", False
        finally:
            self._updating = False
            self._call(self._go_on())
        if ok and self.files.writes:
            error = self._failure(self._one_is_up())
        if not ok or not self.files.meet(error is None):
            raise error or RunFailed("vLLM: another rank could not hand over the weights; it says why")

    def sleep(self) -> None:
        """With colocated = true: has the servers give their GPU memory back until the next load_weights. After the rollouts of a step.

        Collective. Waits for the completions that are being made; who asks for one while they sleep fails. Status: the calls and their order
        are tested; memory was never measured, since a CPU server has no sleep mode.
        """
        if not self.colocated or self._asleep:
            return
        error = self._failure(self._quiet())
        self.files.meet()
        self._asleep = True  # nothing is mended from here on
        if self.files.writes and error is None:
            error = self._failure(self._each(partial(Server.sleep, level=self.sleep_level)))
        if not self.files.meet(error is None):
            raise error or RunFailed("vLLM: another rank could not put the servers to sleep; it says why")

    def fingerprint(self, ids: Sequence[int], limits: tuple[float, float] = (1e-3, 1e-3)) -> dict[str, list[float]]:
        """Server address -> log-probs (nats, temperature 1, no token banned) of ids[1:] given what stands before each; of all servers in use.

        The answer of the first is kept: a server that gets these weights later must give it too before it is used, to within `limits` (of
        the largest difference, and of their mean).
        """
        return self._call(self._fingerprints(list(ids), limits))

    def close(self) -> None:
        """Ends requests, connections, the group and the thread, and deletes the weight files; the servers go on."""
        self.end()
        self.route.close()
        self.files.close()

    # ------------------------------------------------------------ in the event loop

    async def _fingerprints(self, ids: list[int], limits: tuple[float, float]) -> dict[str, list[float]]:
        async def ask(server: Server) -> list[float]:
            await server.holds(self._wanted(server))
            if not server.checked:
                await server.check_logprobs(self.probe_tokens)
            return await server.logprobs(ids)

        told: dict[Server, list[float]] = {}
        while not told or any(not s.down and s not in told for s in self.servers):  # one may have come back meanwhile
            await self._one_is_up()
            told = await self._each(ask)
        self._proof = self.files.label, ids, next(iter(told.values())), limits
        return {server.url: values for server, values in told.items()}

    async def _complete(self, requests: Sequence[Request]) -> list[Completion]:
        for r in requests:
            if not r.context_ids:
                raise InputError("a request has an empty context: the first token needs something to be predicted from")
            if self.max_length and len(r.context_ids) + r.sampling.max_new_tokens > self.max_length:
                raise InputError(
                    f"a context of {len(r.context_ids)} tokens and max_new_tokens = {r.sampling.max_new_tokens} exceed the servers' max_model_len = "
                    f"{self.max_length}: start them with a larger one, or lower rollout.max_new_tokens or data.max_prompt_tokens"
                )
        return await all_of(self._one(r) for r in requests)

    async def _scores(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
        for context, ids in pairs:
            if not context:
                raise InputError("a text to be scored has an empty context: its first token needs something to be predicted from")
            if self.max_length and len(context) + len(ids) + 1 > self.max_length:
                raise InputError(
                    f"a text of {len(context)} + {len(ids)} tokens to be scored, and the one that a server adds, exceed the servers' max_model_len = "
                    f"{self.max_length}: start them with a larger one"
                )

        async def one(context: Sequence[int], ids: Sequence[int]) -> list[float]:
            return await self._asked(lambda server: server.logprobs([*context, *ids], len(context))) if ids else []

        return await all_of(one(context, ids) for context, ids in pairs)

    async def _one(self, request: Request) -> Completion:
        return await self._asked(lambda server: server.complete(request, self.policy_version, **self._checks))
