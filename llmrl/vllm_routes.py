"""The ways that weights take from the learner to vLLM servers. The engine (vllm_engine.py) picks one at start, by what the servers have.

file: safetensors files in a folder that trainer and servers see, a layer being read while the next is gathered. broadcast: the first rank
and all workers of all servers in one group (vllm_broadcast.py), a layer under way while the next is gathered. adapter: with LoRA only the
adapters, as a folder in PEFT's format that the servers load; completions then name the adapter as their model.

`hand_over` runs on the first rank, in the thread that trains; `mend` on any rank, for one server that was down and came back.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import Future
from datetime import timedelta
from functools import partial
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
from torch import Tensor

from llmrl.learner import RunFailed
from llmrl.models import Policy
from llmrl.quantize import sizes
from llmrl.records import InputError
from llmrl.vllm_broadcast import BROKEN, Group, GroupFailed, host_towards, layout, packed
from llmrl.vllm_client import ONCE, Server, Trouble
from llmrl.weights import WeightFiles, layers, merged

Weights = Callable[[], Iterable[tuple[str, Tensor]]]
Asks = Callable[[Server], Coroutine[Any, Any, Any]]
_MARK = "-adapter"
_ADAPTER_KEY = "base_model.model."
"""Begins the names of PEFT's tensors."""


class Crew(Protocol):
    """What a route needs of the engine."""

    @property
    def up(self) -> list[Server]:
        """The servers that take part in this update."""
        ...

    def each(self, ask: Asks) -> Future[Any]:
        """`ask` of every server that is up; one that fails is left out from then on. RunFailed where asking again cannot help."""
        ...

    def ask(self, ask: Asks) -> dict[Server, Future[Any]]:
        """`ask` of every server that is up, and whatever comes of it."""
        ...

    def drop(self, server: Server, why: str) -> None:
        """Leaves it out."""
        ...


class Again(Exception):
    """These weights are lost on their way: they must be read once more, from the first one on."""


class FileRoute:
    """See the module's docstring."""

    name = "file"
    keeps = True
    """What was sent can be sent again later."""

    def __init__(self, files: WeightFiles, crew: Crew, policy: Policy) -> None:
        self.files, self.crew, self.policy = files, crew, policy
        self.dtype = policy.model.dtype  # a sharded learner makes its masters of these weights

    def outgoing(self, weights: Weights) -> Iterator[tuple[str, Tensor]]:
        """What is sent of the learner's weights: adapters merged, the whole model. Collective."""
        return merged(self.policy, weights(), self.dtype) if self.policy.lora else iter(weights())

    def hand_over(self, version: int, stream: Iterator[tuple[str, Tensor]]) -> None:
        """Until every server that is still up holds all of it, under a new label. Raises RunFailed, or Again."""
        sent = self.crew.each(Server.begin_update)
        try:
            self.files.begin(version)
            for n, group in enumerate(layers(stream)):
                path = self.files.write(n, group)
                sent.result()
                sent = self.crew.each(partial(Server.update, path=path))
            sent.result()
        finally:
            sent.cancel()
        self._finish(version)

    def _finish(self, version: int) -> None:
        self.files.whole(version)
        assert self.files.label is not None
        self.crew.each(partial(Server.finish_update, label=self.files.label)).result()

    async def mend(self, server: Server) -> None:
        """Sends one server what all should hold now."""
        paths = self.files.paths()
        if self.files.label is None or not paths:
            why = "no copy of these is kept (engine.keep = false)" if self.files.label else "it holds other weights than it did when this run began"
            raise Trouble(f"{server.url} needs the weights again, but {why}: it is used from the next update on")
        await server.probe_routes(False)
        await server.begin_update()
        for path in paths:
            await server.update(path)
        await server.finish_update(self.files.label)

    def close(self) -> None:
        """Ends what is open, but for the files."""


class BroadcastRoute(FileRoute):
    """See the module's docstring. keep: every layer is also written to a file, for a server that comes back between two updates.

    When a broadcast fails, the servers to blame are left out (those that do not answer, or report a failure of their own), and the weights
    are read again for a group of the others. limit_s: how long one broadcast, or joining, may take.
    """

    name = "broadcast"

    def __init__(self, files: WeightFiles, crew: Crew, policy: Policy, *, limit_s: float, keep: bool) -> None:
        super().__init__(files, crew, policy)
        self.device, self.limit_s, self.keeps = policy.device, limit_s, keep
        self.group: Group | None = None
        self.members: list[Server] = []
        self._store: Any = None
        self._groups = self._mysteries = 0

    def hand_over(self, version: int, stream: Iterator[tuple[str, Tensor]]) -> None:
        self.crew.each(Server.begin_update).result()
        try:
            if self.group is None or self.members != self.crew.up or not all(s.joined == self._name for s in self.members):
                self._join()
            self._send(version, stream)
        except BaseException:
            self.close()
            raise
        self._mysteries = 0
        self._finish(version)

    def close(self) -> None:
        if self.group is not None:
            self.group.close()
            self.group = None

    @property
    def _name(self) -> str:
        return f"{self.files.run}-{self._groups}"

    def _join(self) -> None:
        """A new group of all servers that are up. Those that do not answer any more drop out before: a group waits for all its members."""
        self.close()
        self.crew.each(partial(Server.prepare, leave=True)).result()
        self.members = self.crew.up
        if not self.members:
            return
        away = [s.url for s in self.members if urlsplit(s.url).hostname not in ("127.0.0.1", "localhost", "::1")]
        host = host_towards((away or [self.members[0].url])[0])
        if self._store is None:
            limit = timedelta(seconds=self.limit_s)
            self._store = torch.distributed.TCPStore(host, 0, None, True, limit, wait_for_workers=False)  # type: ignore[attr-defined]
        self._groups += 1
        first, size = {}, 1
        for server in self.members:
            first[server], size = size, size + server.workers
        how: dict[str, Any] = {
            "host": host, "port": self._store.port, "name": self._name, "size": size, "limit_s": self.limit_s,
            "via": "nccl" if self.device.type == "cuda" else "gloo",
        }  # fmt: skip
        asked = self.crew.ask(lambda server: server.prepare(first=first[server], **how))
        try:
            self.group = Group(self._store, self._name, 0, size, self.device, self.limit_s, host)
        except GroupFailed as failed:
            self._blame(asked, str(failed))
        if _troubles(asked):
            self._blame(asked, "a server could not join")
        for server in self.members:
            server.joined = self._name

    def _send(self, version: int, stream: Iterator[tuple[str, Tensor]]) -> None:
        self.files.begin(version)
        flying: tuple[Any, Tensor, dict[Server, Future[Any]]] | None = None
        for n, group in enumerate(layers(stream)):  # gathers, while the layer before is on its way
            data = packed(group, self.device)
            self._land(flying)
            if self.group is not None:
                asked = self.crew.ask(partial(Server.receive, what=layout(group)))
                flying = self.group.send(data), data, asked
            if self.keeps:
                self.files.write(n, group)
        self._land(flying)

    def _land(self, flying: tuple[Any, Tensor, dict[Server, Future[Any]]] | None) -> None:
        """Until a layer is with all servers."""
        if flying is None:
            return
        work, _, asked = flying
        assert self.group is not None
        try:
            self.group.wait(work, stop=lambda: any(f.done() and f.exception() is not None for f in asked.values()))
        except GroupFailed as failed:
            self._blame(asked, str(failed))
        if _troubles(asked):
            self._blame(asked, "a server failed")

    def _blame(self, asked: dict[Server, Future[Any]], why: str) -> None:
        """Leaves out who is to blame, and has the rest tried again. Raises Again or RunFailed."""
        self.close()  # whoever waits for data in the group is released
        troubles, guilty = _troubles(asked), 0
        for server, trouble in troubles.items():
            if trouble.tries == ONCE:
                raise RunFailed(f"vLLM: {trouble}")
            if BROKEN not in str(trouble):
                self.crew.drop(server, str(trouble))
                guilty += 1
        self._mysteries += not guilty
        if self._mysteries > 1:
            said = "; ".join(str(t) for t in troubles.values()) or "no server reports a failure"
            raise RunFailed(f"vLLM: a broadcast of weights failed twice and no server is to blame: {why}; {said}. Set engine.transfer = \"file\"")
        raise Again(why)


class AdapterRoute(FileRoute):
    """See the module's docstring. Its labels are marked, so that another run can tell that the base model is what it was."""

    name = "adapter"

    def __init__(self, files: WeightFiles, crew: Crew, policy: Policy) -> None:
        super().__init__(files, crew, policy)
        files.mark = _MARK

    def outgoing(self, weights: Weights) -> Iterator[tuple[str, Tensor]]:
        return iter(weights())

    def hand_over(self, version: int, stream: Iterator[tuple[str, Tensor]]) -> None:
        folder = self.files.begin(version)
        tensors = {_ADAPTER_KEY + name.replace(".default.", "."): tensor for name, tensor in stream}
        self.files.write(0, tensors, "adapter_model.safetensors")
        self.policy.model.peft_config["default"].save_pretrained(str(folder))  # type: ignore[index]
        self.files.whole(version)
        assert self.files.label is not None
        self.crew.each(partial(Server.adopt, label=self.files.label, folder=folder)).result()

    async def mend(self, server: Server) -> None:
        folder = self.files.place()
        if self.files.label is None or folder is None:
            raise Trouble(f"{server.url} holds other weights than it did when this run began")
        await server.adopt(self.files.label, folder)


def _troubles(asked: dict[Server, Future[Any]]) -> dict[Server, Trouble]:
    """What went wrong with whom, once all have answered."""
    found = {}
    for server, future in asked.items():
        error = future.exception()
        if isinstance(error, Trouble):
            found[server] = error
        elif error is not None:
            raise error
    return found


def choose(asked: str, servers: list[Server], policy: Policy, *, colocated: bool) -> str:
    """The route's name. "auto": adapter where LoRA learns on a base that is not quantised and that the servers still hold, else broadcast,
    else file; only what all servers have."""
    has = frozenset.intersection(*(s.takes for s in servers))
    changed = [s.url for s in servers if s.first != "default" and not s.first.endswith(_MARK)]
    if asked == "auto":
        can = {"adapter": policy.lora and not sizes(policy.model)[1] and not changed, "broadcast": not colocated, "file": True}
        return next(name for name, ok in can.items() if ok and name in has)
    if asked == "adapter" and not policy.lora:
        raise InputError('[engine] vllm: transfer = "adapter" needs [model.lora]; leave it out, or set transfer = "auto"')
    if asked == "adapter" and changed:
        raise InputError(f'[engine] vllm: transfer = "adapter", and {changed[0]} got other base weights from an earlier run; restart it, or take "auto"')
    if asked == "broadcast" and colocated:
        raise InputError('[engine] vllm: transfer = "broadcast" joins no two processes of one GPU; with colocated = true take "file"')
    if asked not in has:
        lacking = ", ".join(s.url for s in servers if asked not in s.takes)
        mend = {
            "broadcast": "start it with --weight-transfer-config '{\"backend\": \"llmrl_broadcast\"}'",
            "adapter": "start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, --enable-lora and --max-lora-rank of at least model.lora.rank",
        }[asked]
        raise InputError(f'[engine] vllm: transfer = "{asked}", which {lacking} does not have: {mend}, or set transfer = "auto"')
    return asked


def make_route(name: str, files: WeightFiles, crew: Crew, policy: Policy, *, limit_s: float, keep: bool) -> FileRoute:
    if name == "broadcast":
        return BroadcastRoute(files, crew, policy, limit_s=limit_s, keep=keep)
    return {"file": FileRoute, "adapter": AdapterRoute}[name](files, crew, policy)
