"""The learner: packed forwards, gradients with fp32 accumulation, AdamW on fp32 weights, and nothing computed twice.

Precision: with model.dtype = "bfloat16" the forward and backward run in bf16 on working weights, while the optimizer keeps fp32 master
weights and gradients are summed over micro-batches in fp32; small updates are not lost to rounding. With "float32" all is fp32.
Over several processes (accelerate's launch, gloo or NCCL) each computes its own micro-batches and gradients are summed before an
update: denominators are already global, so the gradient is that of one process.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmrl.batch import Outputs, TokenBatch, pack, seg_tokens
from llmrl.head import head_logp
from llmrl.models import Policy, trainable
from llmrl.records import Sample

if TYPE_CHECKING:
    from accelerate import Accelerator

    from llmrl.recipe import Optim
    from llmrl.rules.base import Needs


class RunFailed(Exception):
    """A run that must not go on: its message says why and what to do. Commands print it and exit with code 1."""


def learning_rate(optim: Optim, step: int, steps: int) -> float:
    """Learning rate of 0-based `step` of `steps`: constant, or falling from the first step to lr * lr_end at the last (linear or cosine),
    times a linear warm-up over the first warmup_steps."""
    warm = min(1.0, (step + 1) / optim.warmup_steps) if optim.warmup_steps else 1.0
    done = step / max(1, steps - 1)
    shape = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[optim.schedule]
    return optim.lr * warm * (shape if optim.schedule == "constant" else optim.lr_end + (1 - optim.lr_end) * shape)


class Learner:
    """Owns the weights that learn. `version` counts updates since the first weights."""

    def __init__(self, policy: Policy, accelerator: Accelerator, *, head_chunk: int = 1024, temperature: float = 1.0):
        self.policy, self.accelerator = policy, accelerator
        self.head_chunk, self.temperature = head_chunk, temperature
        self.version = 0
        self.params = trainable(policy.model)
        self.split = policy.model.dtype == torch.bfloat16
        self.masters = [p.detach().float().clone().requires_grad_() for _, p in self.params] if self.split else [p for _, p in self.params]
        if self.split:
            for (_, p), master in zip(self.params, self.masters, strict=True):
                p.register_post_accumulate_grad_hook(self._to_master(master))
        self.reference: Policy | None = None
        self.optimizer: torch.optim.AdamW | None = None
        policy.model.train()

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

    # ------------------------------------------------------------ set-up

    def start(self, optim: Optim) -> None:
        """A fresh optimizer: at the start of a warm start, and again of RL."""
        self.optim = optim
        self.optimizer = torch.optim.AdamW(self.masters, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, foreach=True)

    def freeze_reference(self) -> None:
        """The present weights become the reference model."""
        model = copy.deepcopy(self.policy.model).requires_grad_(False).eval()
        self.reference = Policy(model, self.policy.chat, self.policy.stop_ids, self.policy.banned_ids, self.policy.kernel)

    # ------------------------------------------------------------ forward

    def _logp(self, policy: Policy, batch: TokenBatch, entropy: bool) -> tuple[Tensor, Tensor | None]:
        hidden = policy.hidden(batch.ids_P, batch.positions_P, batch.plan(policy.kernel))
        return head_logp(
            hidden.index_select(0, batch.source_T), *policy.head, batch.tokens_T,
            temperature=self.temperature, banned_ids=policy.banned_ids, chunk=self.head_chunk, entropy=entropy,
        )  # fmt: skip

    def forward(self, batch: TokenBatch, needs: Needs) -> Outputs:
        """Log-probs with gradient, and what the rule asked for. old_logp is logp itself unless a stream "old_logp" holds it."""
        logp, entropy = self._logp(self.policy, batch, needs.entropy)
        old = batch.stream.get("old_logp")
        return Outputs(logp, logp.detach() if old is None else torch.where(old.isnan(), logp.detach(), old), batch.stream.get("ref_logp"), entropy)

    @torch.no_grad()
    def add_stream(self, name: str, samples: Sequence[Sample], *, tokens: int) -> None:
        """Fills samples' stream "old_logp" (weights as they are now) or "ref_logp" (reference model): one forward without gradient."""
        policy = {"old_logp": self.policy, "ref_logp": self.reference}[name]
        if policy is None:
            raise RunFailed("the rule asks for ref_logp but no reference model was made")
        todo = [s for s in samples if name not in s.streams]
        training = policy.model.training
        policy.model.eval()
        for batch in pack(todo, [torch.zeros(len(s.token_ids)) for s in todo], tokens=tokens):
            logp, _ = self._logp(policy, batch.to(policy.device), entropy=False)
            for i, values in zip(batch.sample_index, seg_tokens(logp.cpu(), batch), strict=True):
                todo[i].streams[name] = values.tolist()
        policy.model.train(training)

    # ------------------------------------------------------------ update

    def backward(self, loss: Tensor) -> None:
        """Adds this micro-batch's gradient."""
        loss.backward()

    def update(self, lr: float) -> float:
        """Sums gradients over ranks, clips, steps, and returns the gradient norm before clipping."""
        assert self.optimizer is not None, "start() comes first"
        for m in self.masters:
            if m.grad is None:  # a step without a live sample is a step with gradient 0: the optimizer's momentum still moves
                m.grad = torch.zeros_like(m)
        if self.accelerator.num_processes > 1:
            for m in self.masters:
                torch.distributed.all_reduce(m.grad)
        grads = [m.grad for m in self.masters if m.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        if not torch.isfinite(norm):
            bad = [name for (name, _), m in zip(self.params, self.masters, strict=True) if m.grad is not None and not m.grad.isfinite().all()]
            raise RunFailed(f"update {self.version}: the gradient is not finite in {len(bad)} tensors, first {bad[0]}; no weight was changed")
        if self.optim.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(self.masters, self.optim.clip_norm, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._publish()
        self.version += 1
        return float(norm)

    @torch.no_grad()
    def _publish(self) -> None:
        """Working weights take over the masters'."""
        if self.split:
            for (_, p), master in zip(self.params, self.masters, strict=True):
                p.copy_(master)

    def weights(self) -> Iterable[tuple[str, Tensor]]:
        """(name, tensor) of the working weights, for engines that do not share memory with the learner."""
        return ((name, p.detach()) for name, p in self.params)

    def all_sum(self, x: Tensor) -> Tensor:
        """Sum over processes; the tensor itself on one."""
        return self._all(x, torch.distributed.ReduceOp.SUM)

    def all_max(self, x: Tensor) -> Tensor:
        """Largest over processes, element by element."""
        return self._all(x, torch.distributed.ReduceOp.MAX)

    def _all(self, x: Tensor, how: Any) -> Tensor:
        if self.accelerator.num_processes == 1:
            return x
        moved = x.detach().clone().to(self.policy.device)
        torch.distributed.all_reduce(moved, op=how)
        return moved.to(x.device)

    # ------------------------------------------------------------ state

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything beyond the model folder that an exact resume needs: masters (bf16), optimizer moments and counts."""
        assert self.optimizer is not None
        out: dict[str, Tensor] = {}
        for (name, _), m in zip(self.params, self.masters, strict=True):
            if self.split:
                out[f"master/{name}"] = m.detach()
            for key, value in self.optimizer.state.get(m, {}).items():
                out[f"{key}/{name}"] = torch.as_tensor(value)
        return out

    @torch.no_grad()
    def load_state_tensors(self, weights: dict[str, Tensor], state: dict[str, Tensor]) -> None:
        """The counterpart: `weights` by parameter name, `state` as state_tensors() gave it."""
        assert self.optimizer is not None
        for (name, p), m in zip(self.params, self.masters, strict=True):
            p.copy_(weights[name])
            if self.split:
                m.copy_(state[f"master/{name}"])
            entry: dict[str, Any] = {k: state[f"{k}/{name}"].clone() for k in ("step", "exp_avg", "exp_avg_sq") if f"{k}/{name}" in state}
            if entry:
                self.optimizer.state[m] = entry
