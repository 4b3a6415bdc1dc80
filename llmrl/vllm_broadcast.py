"""Tensors from the trainer's first rank to all workers of all vLLM servers by broadcast: NCCL between GPUs, gloo between CPUs.

The group is private: made directly on a TCPStore of the trainer's, beside the default groups of trainer and vLLM, which know nothing of it.
Both sides import this module (inside vLLM it is llmrl/vllm_plugin.py), so it needs torch and nothing else. A layer travels as one piece of
bytes, so a broadcast does not care for dtypes. vLLM's own transfer backends (nccl, ipc) are not used: their trainer's half is vLLM code, and
vLLM would have to be installed, with its pin on torch, in the trainer's environment.

Status: gloo is tested against real servers (vLLM 0.32 on CPU); NCCL has not been run by us, it differs in one line of `Group`.
"""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor, distributed

BROKEN = "llmrl_broadcast: the group"
"""Begins what a worker says when not it but the group failed: another member is to blame, and the server can join the next one."""
_ALIGN = 16


class GroupFailed(Exception):
    """A broadcast did not end: a member is gone, or did not come in time."""


class Group:
    """One member of a group of `size`; rank 0, the trainer, sends. limit_s: how long joining or one broadcast may take."""

    def __init__(self, store: Any, name: str, rank: int, size: int, device: torch.device, limit_s: float, host: str) -> None:
        self.rank, self.device, self.limit = rank, device, timedelta(seconds=limit_s)
        store = distributed.PrefixStore(name, store)  # type: ignore[attr-defined]
        store.set_timeout(self.limit)
        try:
            self.group: Any = _nccl(store, rank, size) if device.type == "cuda" else _gloo(store, rank, size, self.limit, host)
        except RuntimeError as error:
            raise GroupFailed(f"{BROKEN} did not come together: {_first_line(error)}") from None

    def send(self, data: Tensor) -> Any:
        """Starts a broadcast of rank 0's bytes; see `wait`."""
        return self.group.broadcast(data, 0)

    def wait(self, work: Any, stop: Callable[[], bool] = lambda: False) -> None:
        """Until a broadcast has ended. GroupFailed where it failed, took too long, or `stop` says that it will not end."""
        end, pause = time.monotonic() + self.limit.total_seconds(), 1e-4
        while not work.is_completed():
            if stop() or time.monotonic() > end:
                raise GroupFailed(f"{BROKEN}: a broadcast did not end" + ("" if stop() else f" within {self.limit.total_seconds():g} s"))
            time.sleep(pause)
            pause = min(2 * pause, 5e-3)
        try:
            work.wait()
        except RuntimeError as error:
            raise GroupFailed(f"{BROKEN} broke: {_first_line(error)}") from None

    def close(self) -> None:
        """Leaves. Connections are closed, so that members who wait for data of this one do not wait for their limit."""
        group, self.group = self.group, None
        if group is not None:
            group.abort()


def _nccl(store: Any, rank: int, size: int) -> Any:
    options = distributed.ProcessGroupNCCL.Options()
    options._timeout = timedelta(days=365)  # its watchdog ends the process; `wait` has the deadline that counts
    return distributed.ProcessGroupNCCL(store, rank, size, options)


def _gloo(store: Any, rank: int, size: int, limit: timedelta, host: str) -> Any:
    options = distributed.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices, options._timeout = [distributed.ProcessGroupGloo.create_device(hostname=host)], limit
    options._threads = 2
    return distributed.ProcessGroupGloo(store, rank, size, options)  # type: ignore[call-arg]


def host_towards(url: str) -> str:
    """This machine's address on the way to a server. No packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        try:
            s.connect((urlsplit(url).hostname or "127.0.0.1", 9))
        except OSError:
            return "127.0.0.1"
        return s.getsockname()[0]


def layout(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What an `update_weights` call says of a piece: names, shapes, dtypes, in the order of its bytes."""
    return {
        "names": list(tensors), "shapes": [list(t.shape) for t in tensors.values()],
        "dtypes": [str(t.dtype).removeprefix("torch.") for t in tensors.values()],
    }  # fmt: skip


def _places(shapes: list[list[int]], dtypes: list[str]) -> tuple[list[tuple[int, int]], int]:
    """((first byte, bytes) of each tensor, bytes in all)."""
    places, at = [], 0
    for shape, dtype in zip(shapes, dtypes, strict=True):
        size = math.prod(shape) * getattr(torch, dtype).itemsize
        places.append((at, size))
        at += -(-size // _ALIGN) * _ALIGN
    return places, at


def packed(tensors: dict[str, Tensor], device: torch.device) -> Tensor:
    """uint8 [bytes] on `device`: all tensors, each from a multiple of 16 bytes on."""
    what = layout(tensors)
    places, size = _places(what["shapes"], what["dtypes"])
    data = torch.empty(size, dtype=torch.uint8, device=device)
    for (at, n), tensor in zip(places, tensors.values(), strict=True):
        data[at : at + n].view(tensor.dtype).copy_(tensor.detach().reshape(-1))
    return data


def unpacked(data: Tensor, names: list[str], shapes: list[list[int]], dtypes: list[str]) -> Iterator[tuple[str, Tensor]]:
    """The counterpart; tensors are views of `data`, which must not be written to again."""
    for name, shape, dtype, (at, n) in zip(names, shapes, dtypes, _places(shapes, dtypes)[0], strict=True):
        yield name, data[at : at + n].view(getattr(torch, dtype)).view(shape)


def received(group: Group, shapes: list[list[int]], dtypes: list[str]) -> Tensor:
    """A worker's part in one broadcast: the bytes, in memory of their own."""
    data = torch.empty(_places(shapes, dtypes)[1], dtype=torch.uint8, device=group.device)
    group.wait(group.send(data))
    return data


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
