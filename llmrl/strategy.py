"""How the learner's weights, gradients and optimizer lie over processes: on each of them whole, or sharded by FSDP2. DeepSpeed: zero.py.

All strategies give the gradient that one process would: denominators are global before the first backward, so gradients are summed over
ranks, never averaged. `in_step` strategies run collectives inside forward and backward: all ranks must do equally many of them.

Precision: with model.dtype = "bfloat16" forward and backward run in bf16 while the optimizer keeps fp32 master weights and gradients are
summed in fp32 (over micro-batches; over ranks too). With "float32" all is fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from llmrl.head import head_logp
from llmrl.models import Policy, trainable
from llmrl.records import InputError

if TYPE_CHECKING:
    from llmrl.recipe import Optim

Params = list[tuple[str, nn.Parameter]]
STATE = ("step", "exp_avg", "exp_avg_sq")
"""AdamW's state of one parameter."""


class PackedLogp(nn.Module):
    """Packed forward and vocabulary head as one module, so that sharding hooks gather the head's weight for as long as it is needed."""

    def __init__(self, policy: Policy, head_chunk: int):
        super().__init__()
        self.model = policy.model
        self.policy, self.head_chunk = policy, head_chunk

    def forward(
        self, ids_P: Tensor, positions_P: Tensor, plan: Any, source_T: Tensor, tokens_T: Tensor, temperature: float, entropy: bool, ban: bool = True,
        hidden: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """(log-probs [T], entropies [T] or None) of tokens_T, fp32. ban: the tokens that are never sampled are outside the softmax.

        hidden: (the last hidden states that predict them [T, D], None) instead, fp32, without the head.
        """
        hidden_TD = self.policy.hidden(ids_P, positions_P, plan).index_select(0, source_T)
        if hidden:
            return hidden_TD.float(), None
        return head_logp(
            hidden_TD, *self.policy.head, tokens_T,
            temperature=temperature, banned_ids=self.policy.banned_ids if ban else (), chunk=self.head_chunk, entropy=entropy,
        )  # fmt: skip


class Strategy(Protocol):
    """What the learner needs of one. `params` are the trainable ones, in a fixed order, by their names in the plain model."""

    name: str
    in_step: bool
    """Every rank must run the same number of forwards and backwards."""
    params: Params
    module: Callable[..., tuple[Tensor, Tensor | None]]
    """Called like PackedLogp.forward."""

    def start(self, optim: Optim) -> None:
        """A fresh optimizer."""
        ...

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds a micro-batch's gradient; `last`: the update comes next."""
        ...

    def update(self, lr: float) -> float:
        """Sums gradients over ranks, clips, steps; the gradient's norm before clipping. Raises BadGradient where that is not finite."""
        ...

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every trainable parameter as one whole tensor in the model's dtype, one at a time. Collective: every rank goes through all of it."""
        ...

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """"master/NAME" (bf16 only) and "step/", "exp_avg/", "exp_avg_sq/NAME": whole tensors, one at a time. Collective."""
        ...

    def load(self, weights: dict[str, Tensor], state: dict[str, Tensor]) -> None:
        """The counterpart, on every rank with the same tensors; without `state` only weights are set."""
        ...

    def facts(self) -> dict[str, Any]:
        """What really runs, measured: name, bytes of weights and optimizer on this rank and in all."""
        ...


class BadGradient(Exception):
    """The gradient is not finite. Its text says where, and what became of the weights."""


class Replicated:
    """Every process holds everything; gradients are all-reduced before the update. One process, or plain data parallelism (DDP)."""

    in_step = False

    def __init__(self, policy: Policy, head_chunk: int, world: int):
        self.name, self.world = "ddp" if world > 1 else "single", world
        self.module = PackedLogp(policy, head_chunk)
        self.params = trainable(policy.model)
        self.split = policy.model.dtype == torch.bfloat16
        self.masters = [p.detach().float().clone().requires_grad_() for _, p in self.params] if self.split else [p for _, p in self.params]
        if self.split:
            for (_, p), master in zip(self.params, self.masters, strict=True):
                p.register_post_accumulate_grad_hook(self._to_master(master))
        self.optimizer: torch.optim.AdamW | None = None

    @staticmethod
    def _to_master(master: Tensor) -> Callable[[Tensor], None]:
        def move(p: Tensor) -> None:
            assert p.grad is not None
            if master.grad is None:
                master.grad = p.grad.float()
            else:
                master.grad += p.grad
            p.grad = None

        return move

    def start(self, optim: Optim) -> None:
        self.clip_norm = optim.clip_norm
        self.optimizer = adamw(self.masters, optim)

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    def update(self, lr: float) -> float:
        assert self.optimizer is not None, "start() comes first"
        for m in self.masters:
            if m.grad is None:  # a step without a live sample is a step with gradient 0: the optimizer's momentum still moves
                m.grad = torch.zeros_like(m)
            if self.world > 1:
                torch.distributed.all_reduce(m.grad)
        norm = clip(self.params, self.masters, self.clip_norm)
        step(self.optimizer, lr)
        self._publish()
        return norm

    @torch.no_grad()
    def _publish(self) -> None:
        """Working weights take over the masters'."""
        if self.split:
            for (_, p), master in zip(self.params, self.masters, strict=True):
                p.copy_(master)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, p.detach()) for name, p in self.params)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        assert self.optimizer is not None
        for (name, _), m in zip(self.params, self.masters, strict=True):
            if self.split:
                yield f"master/{name}", m.detach()
            for key, value in self.optimizer.state.get(m, {}).items():
                yield f"{key}/{name}", torch.as_tensor(value)

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor], state: dict[str, Tensor]) -> None:
        for (name, p), m in zip(self.params, self.masters, strict=True):
            p.copy_(weights[name])
            if self.split:
                m.copy_(state.get(f"master/{name}", weights[name]))
            entry = {k: state[f"{k}/{name}"].clone() for k in STATE if f"{k}/{name}" in state}
            if entry and self.optimizer is not None:
                self.optimizer.state[m] = entry

    def facts(self) -> dict[str, Any]:
        return {"strategy": self.name, **_bytes(self.params, self.masters, lambda p: p)}


class Sharded:
    """FSDP2: every weight, gradient and moment is cut into equal parts over the ranks; a layer is gathered only while it runs.

    Source: torch.distributed.fsdp.fully_shard on a one-dimensional mesh, driven directly (accelerate's plugin becomes DDP on CPU).
    Its gradients are means over ranks; losses are multiplied by the number of ranks, so that they are sums.
    """

    in_step = True
    name = "fsdp2"

    def __init__(self, policy: Policy, head_chunk: int, world: int):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        self.world, self.dtype = world, policy.model.dtype
        policy.model.float()  # the shards are the fp32 masters; bf16 exists while a layer runs
        module = PackedLogp(policy, head_chunk)
        mesh = init_device_mesh(policy.device.type, (world,))
        how: dict[str, Any] = {"mesh": mesh}
        if self.dtype == torch.bfloat16:
            how["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for layer in layers_of(policy.model):
            fully_shard(layer, **how)
        fully_shard(module, **how)
        self.module = module
        self.params = trainable(policy.model)
        self.optimizer: torch.optim.AdamW | None = None
        refuse_unsharded(self.name, self.facts(), world, len(self.params) * policy.model.config.get_text_config().hidden_size)

    def start(self, optim: Optim) -> None:
        self.clip_norm = optim.clip_norm
        self.optimizer = adamw([p for _, p in self.params], optim)

    def backward(self, loss: Tensor, last: bool) -> None:
        (loss * self.world).backward()

    def update(self, lr: float) -> float:
        assert self.optimizer is not None, "start() comes first"
        for _, p in self.params:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        norm = clip(self.params, [p for _, p in self.params], self.clip_norm)
        step(self.optimizer, lr)
        return norm

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, whole(p).to(self.dtype)) for name, p in self.params)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        assert self.optimizer is not None
        for name, p in self.params:
            if self.dtype == torch.bfloat16:
                yield f"master/{name}", whole(p)
            for key, value in self.optimizer.state.get(p, {}).items():
                yield f"{key}/{name}", whole(torch.as_tensor(value))

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor], state: dict[str, Tensor]) -> None:
        for name, p in self.params:
            p.copy_(cut_like(state.get(f"master/{name}", weights[name]), p))
            entry = {k: state[f"{k}/{name}"] for k in STATE if f"{k}/{name}" in state}
            if entry and self.optimizer is not None:
                self.optimizer.state[p] = {k: v.clone() if k == "step" else cut_like(v, p) for k, v in entry.items()}

    def facts(self) -> dict[str, Any]:
        return {"strategy": self.name, **_bytes(self.params, [p for _, p in self.params], lambda p: p.to_local())}


def rest(module: Any) -> None:
    """After forwards without gradient: FSDP2 keeps its outermost weights gathered until a backward pass, which does not come."""
    if hasattr(module, "reshard"):
        module.reshard()


def adamw(params: list[Any], optim: Optim) -> torch.optim.AdamW:
    return torch.optim.AdamW(params, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, foreach=True)


def clip(params: Params, holders: list[Any], limit: float) -> float:
    """Scales the holders' gradients to `limit` (0 = off) and returns their norm before. Raises BadGradient where it is not finite."""
    grads = [m.grad for m in holders if m.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    value = float(whole(norm))
    if not abs(value) < float("inf"):
        bad = [name for (name, _), m in zip(params, holders, strict=True) if m.grad is not None and not local(m.grad).isfinite().all()]
        where = f"in {len(bad)} tensors, first {bad[0]}" if bad else "on another rank"
        raise BadGradient(f"{where}; no weight was changed")
    if limit:
        torch.nn.utils.clip_grads_with_norm_(holders, limit, norm)
    return value


def step(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def refuse_unsharded(asked: str, facts: dict[str, Any], world: int, slack: int) -> None:
    """InputError when what runs is not what was asked for. slack: elements that padding of uneven shards may add to a rank."""
    mine, everything = facts["weight_bytes_rank"], facts["weight_bytes_all"]
    if facts["strategy"] != asked or mine > everything / world + 4 * slack + 4096:
        raise InputError(f"learner.strategy = {asked} over {world} processes, but {facts['strategy']} runs, with {mine} of {everything} bytes on this rank")


def layers_of(model: Any) -> list[nn.Module]:
    """The blocks that are gathered one at a time: the modules that transformers says must not be split."""
    names = set(model._no_split_modules or ())
    found = [m for m in model.modules() if type(m).__name__ in names]
    if not found:
        raise InputError(f"model.path: {type(model).__name__} does not say what its layers are (_no_split_modules), so it cannot be sharded")
    return found


def whole(x: Tensor) -> Tensor:
    """A sharded tensor gathered, detached; any other as it is. Collective."""
    return x.full_tensor().detach() if hasattr(x, "full_tensor") else x.detach()  # type: ignore[operator]


def local(x: Tensor) -> Tensor:
    """This rank's part."""
    return x.to_local() if hasattr(x, "to_local") else x  # type: ignore[operator]


def cut_like(x: Tensor, like: Any) -> Tensor:
    """This rank's part of a whole tensor, sharded as `like` is (or not). No communication: every rank has the whole."""
    if not hasattr(like, "device_mesh"):
        return x.to(like.device, like.dtype)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.to(like.device, like.dtype), like.device_mesh, like.placements, src_data_rank=None)


def _bytes(params: Params, masters: list[Any], part: Callable[[Any], Tensor]) -> dict[str, int]:
    """Weights as the optimizer holds them: on this rank, and in all."""
    return {
        "weight_bytes_rank": sum(part(m).numel() * m.element_size() for m in masters),
        "weight_bytes_all": sum(p.numel() * m.element_size() for (_, p), m in zip(params, masters, strict=True)),
    }
