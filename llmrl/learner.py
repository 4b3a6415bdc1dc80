"""The learner: packed forwards, log-probs under the policy and its reference, updates, and nothing computed twice.

Over several processes (gloo or NCCL) each computes its own micro-batches and gradients are summed before an update: denominators are
already global, so the gradient is that of one process. How weights, gradients and optimizer lie over them: strategy.py.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmrl.batch import Outputs, TokenBatch, pack, seg_tokens
from llmrl.models import Policy
from llmrl.records import Sample
from llmrl.strategy import BadGradient, PackedLogp, Replicated, Sharded, Strategy, rest

if TYPE_CHECKING:
    from accelerate import Accelerator

    from llmrl.recipe import Optim
    from llmrl.rules.base import HiddenFn, Needs


class RunFailed(Exception):
    """A run that must not go on: its message says why and what to do. Commands print it and exit with code 1."""


def learning_rate(optim: Optim, step: int, steps: int) -> float:
    """Learning rate of 0-based `step` of `steps`: constant, or falling from the first step to lr * lr_end at the last (linear or cosine),
    times a linear warm-up over the first warmup_steps."""
    warm = min(1.0, (step + 1) / optim.warmup_steps) if optim.warmup_steps else 1.0
    done = step / max(1, steps - 1)
    shape = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[optim.schedule]
    return optim.lr * warm * (shape if optim.schedule == "constant" else optim.lr_end + (1 - optim.lr_end) * shape)


def numbers_of(fns: Mapping[str, HiddenFn], hidden_ND: Tensor) -> dict[str, list[float]]:
    """Stream -> one number a token, of one sample's hidden states (rules.base.HiddenFn). Raises ValueError where a fn gives another shape."""
    n, found = len(hidden_ND), {name: fn(hidden_ND) for name, fn in fns.items()}
    wrong = next((name for name, x in found.items() if x.shape not in ((), (n,))), None)
    if wrong is not None:
        raise ValueError(f"Needs.hidden[{wrong!r}] gave the shape {tuple(found[wrong].shape)} for {n} tokens; it must be one number, or one a token")
    return {name: x.expand(n).tolist() for name, x in found.items()}


class Learner:
    """Owns the weights that learn. `version` counts updates since the first weights.

    strategy: how they lie over processes; None = whole in each. make_policy: the policy as it was loaded, another copy: a sharded
    learner needs it for the reference model.
    """

    def __init__(
        self, policy: Policy, accelerator: Accelerator, *,
        strategy: Strategy | None = None, head_chunk: int = 1024, temperature: float = 1.0, make_policy: Callable[[], Policy] | None = None,
    ):  # fmt: skip
        self.policy, self.accelerator = policy, accelerator
        self.head_chunk, self.temperature, self.make_policy = head_chunk, temperature, make_policy
        self.version = 0
        self.held = strategy or Replicated(policy, head_chunk, accelerator.num_processes)
        self.params = self.held.params
        self.reference: Policy | None = None
        self._reference: Callable[..., tuple[Tensor, Tensor | None]] | None = None
        policy.model.train()

    # ------------------------------------------------------------ set-up

    def start(self, optim: Optim) -> None:
        """A fresh optimizer: at the start of a warm start, and again of RL."""
        self.held.start(optim)

    def freeze_reference(self) -> None:
        """The present weights become the reference model. With LoRA it is the model without its adapters, which costs no memory."""
        if self.policy.lora:
            self.reference, self._reference = self.policy, self._without_adapters
            return
        if self.held.in_step:
            assert self.make_policy is not None, "a sharded learner makes its reference model from a copy of the policy"
            policy = self.make_policy()
            there = dict(policy.model.named_parameters())
            with torch.no_grad():
                for name, weight in self.held.weights():
                    there[name].copy_(weight)
        else:
            policy = replace(self.policy, model=copy.deepcopy(self.policy.model))
        policy.model.requires_grad_(False).eval()
        self.reference = policy
        sharded = self.held.name in ("fsdp2", "zero3")  # where the weights that learn are sharded, these are too
        self._reference = Sharded(policy, self.head_chunk, self.accelerator.num_processes).module if sharded else PackedLogp(policy, self.head_chunk)

    def _without_adapters(self, *inputs: Any) -> tuple[Tensor, Tensor | None]:
        self.policy.model.disable_adapters()
        try:
            return self.held.module(*inputs)
        finally:
            self.policy.model.enable_adapters()

    # ------------------------------------------------------------ forward

    def _logp(self, module: Any, batch: TokenBatch, entropy: bool, hidden: bool = False) -> tuple[Tensor, Tensor | None]:
        plan = batch.plan(self.policy.kernel)
        return module(batch.ids_P, batch.positions_P, plan, batch.source_T, batch.tokens_T, self.temperature, entropy, True, hidden)

    def forward(self, batch: TokenBatch, needs: Needs) -> Outputs:
        """Log-probs with gradient, and what the rule asked for. old_logp is logp itself unless a stream "old_logp" holds it."""
        logp, entropy = self._logp(self.held.module, batch, needs.entropy)
        old = batch.stream.get("old_logp")
        return Outputs(logp, logp.detach() if old is None else torch.where(old.isnan(), logp.detach(), old), batch.stream.get("ref_logp"), entropy)

    def in_step(self, batches: Sequence[TokenBatch], *, backward: bool = True) -> Iterator[tuple[TokenBatch, bool]]:
        """(micro-batch on the device, whether it is the last before the update) of each.

        A sharded learner runs collectives in every forward and backward, so a rank with fewer micro-batches than another adds passes of
        one token and weight 0: the gradient is the same, and nobody waits for a rank that has nothing to do.
        """
        n = len(batches)
        if self.held.in_step:
            n = max(1, int(self.all_max(torch.tensor([float(n)]))[0]))
        for k, batch in enumerate(batches):
            yield batch.to(self.policy.device), k + 1 == n
        for k in range(len(batches), n):
            token = min(self.policy.stop_ids)
            (blank,) = pack([Sample("blank", "blank", [token], [token], None, 0, weights={})], [torch.zeros(1)], tokens=1)
            logp, _ = self._logp(self.held.module, blank.to(self.policy.device), False)
            if backward:
                self.held.backward(0.0 * logp.sum(), k + 1 == n)

    @torch.no_grad()
    def add_stream(self, name: str, samples: Sequence[Sample], *, tokens: int) -> None:
        """Fills samples' stream "old_logp", "old_entropy" (weights as they are now) or "ref_logp" (reference model): one forward without gradient."""
        policy, module = (self.reference, self._reference) if name == "ref_logp" else (self.policy, self.held.module)
        if policy is None or module is None:
            raise RunFailed("the rule asks for ref_logp but no reference model was made")
        todo = [s for s in samples if name not in s.streams]
        for s, values in self._measured(policy, module, todo, tokens, entropy=name == "old_entropy"):
            s.streams[name] = s.spread(values.tolist())

    @torch.no_grad()
    def add_hidden_streams(self, fns: Mapping[str, HiddenFn], samples: Sequence[Sample], *, tokens: int) -> None:
        """Fills samples' streams with what each fn makes of their hidden states (weights as they are now): one forward without gradient for all."""
        for s, hidden_ND in self._measured(self.policy, self.held.module, samples, tokens, hidden=True):
            s.streams |= {name: s.spread(values) for name, values in numbers_of(fns, hidden_ND).items()}

    def _measured(
        self, policy: Policy, module: Any, samples: Sequence[Sample], tokens: int, *, entropy: bool = False, hidden: bool = False
    ) -> Iterator[tuple[Sample, Tensor]]:
        """Each sample with its log-probs, entropies [n] or hidden states [n, D], n = Sample.length, by forwards without dropout; a micro-batch's are
        dropped before the next."""
        training = policy.model.training
        policy.model.eval()
        batches = pack(samples, [torch.zeros(s.length) for s in samples], tokens=tokens)
        for batch, _ in self.in_step(batches, backward=False):
            values, entropies = self._logp(module, batch, entropy, hidden)
            for i, own in zip(batch.sample_index, seg_tokens(values if entropies is None else entropies, batch), strict=True):
                yield samples[i], own
        rest(module)
        policy.model.train(training)

    @torch.no_grad()
    def probe(self, ids: Sequence[int]) -> list[float]:
        """Log-probs (nats) of ids[1:] given what stands before each, at temperature 1 and with no token banned. Every rank must ask."""
        (batch,) = pack([Sample("probe", "probe", [ids[0]], list(ids[1:]), None, self.version)], [torch.zeros(len(ids) - 1)], tokens=len(ids))
        b = batch.to(self.policy.device)
        logp, _ = self.held.module(b.ids_P, b.positions_P, b.plan(self.policy.kernel), b.source_T, b.tokens_T, 1.0, False, False)
        rest(self.held.module)
        return logp.tolist()

    # ------------------------------------------------------------ update

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Adds this micro-batch's gradient; `last` as in_step says."""
        self.held.backward(loss, last)

    def update(self, lr: float) -> float:
        """Sums gradients over ranks, clips, steps, and returns the gradient norm before clipping."""
        try:
            norm = self.held.update(lr)
        except BadGradient as bad:
            raise RunFailed(f"update {self.version}: the gradient is not finite {bad}") from None
        self.version += 1
        return norm

    def load(self, weights: dict[str, Tensor], state: dict[str, Tensor]) -> None:
        """Weights and optimizer as held.weights() and held.state() gave them, under whatever strategy. Every rank has all tensors."""
        if self.held.in_step and state:  # DeepSpeed makes its moments at the first update: one of a zero gradient, at learning rate 0
            for _ in self.in_step([]):
                pass
            self.held.update(0.0)
        self.held.load(weights, state)

    def weights(self) -> Iterable[tuple[str, Tensor]]:
        """(name, whole tensor) of the weights that learn, one at a time, for engines that do not share memory with the learner. Collective."""
        return self.held.weights()

    def all_sum(self, x: Tensor) -> Tensor:
        """Sum over processes; the tensor itself on one."""
        return self._all(x, torch.distributed.ReduceOp.SUM)

    def all_max(self, x: Tensor) -> Tensor:
        """Largest over processes, element by element."""
        return self._all(x, torch.distributed.ReduceOp.MAX)

    def gather(self, value: Any) -> list[Any]:
        """JSON-able values of all ranks, in their order. They travel as text: nothing is unpickled."""
        if self.accelerator.num_processes == 1:
            return [value]
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.policy.device)
        sizes = [torch.zeros(1, dtype=torch.long, device=text.device) for _ in range(self.accelerator.num_processes)]
        torch.distributed.all_gather(sizes, torch.tensor([len(text)], device=text.device))
        longest = max(int(n) for n in sizes)
        parts = [torch.zeros(longest, dtype=torch.uint8, device=text.device) for _ in sizes]
        torch.distributed.all_gather(parts, torch.nn.functional.pad(text, (0, longest - len(text))))
        return [json.loads(bytes(p[: int(n)].tolist())) for p, n in zip(parts, sizes, strict=True)]

    def _all(self, x: Tensor, how: Any) -> Tensor:
        if self.accelerator.num_processes == 1:
            return x
        moved = x.detach().clone().to(self.policy.device)
        torch.distributed.all_reduce(moved, op=how)
        return moved.to(x.device)
