"""DeepSpeed ZeRO as a learner strategy: stage 1 shards the optimizer, 2 the gradients too, 3 the weights too. Needs the extra `deepspeed`.

deepspeed.initialize is called directly (accelerate's plugin becomes DDP on CPU). Source: ZeRO, arXiv:1910.02054.
Its gradients are means over ranks; losses are multiplied by the number of ranks, so that they are sums.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmrl.models import Policy, trainable
from llmrl.records import InputError
from llmrl.strategy import BadGradient, PackedLogp, refuse_unsharded

if TYPE_CHECKING:
    from llmrl.recipe import Optim


class Zero:
    """ZeRO stage 1, 2 or 3; `offload` keeps the optimizer (and at stage 3 the weights) in CPU memory."""

    in_step = True

    def __init__(self, policy: Policy, head_chunk: int, world: int, stage: int, offload: bool):
        self.name, self.world, self.stage, self.offload = f"zero{stage}", world, stage, offload
        self.policy, self.dtype = policy, policy.model.dtype
        self.packed = PackedLogp(policy, head_chunk)
        self.params = trainable(policy.model)
        self.shapes = {name: p.shape for name, p in self.params}
        self.engine = self._initialize()
        self.module: Any = self.engine
        facts = self.facts()
        refuse_unsharded(self.name, facts, world, len(self.params))

    def _initialize(self) -> Any:
        if self.policy.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        try:
            deepspeed = importlib.import_module("deepspeed")
        except ImportError as error:
            raise InputError(f"learner.strategy = {self.name} needs DeepSpeed; pip install 'llmrl[deepspeed]'") from error
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        deepspeed.init_distributed(dist_backend="nccl" if self.policy.device.type == "cuda" else "gloo", verbose=False)
        if self.stage == 3:  # the head's forward is never called, its weight is read: gathered for as long as the whole module runs
            for p in self.policy.head:
                if p is not None:
                    deepspeed.zero.register_external_parameter(self.packed, p)
        place = {"device": "cpu"} if self.offload else None
        zero = {"stage": self.stage, "overlap_comm": False, **({"offload_optimizer": place} if place else {})}
        if self.stage == 3 and place:
            zero["offload_param"] = place
        config = {
            "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "zero_optimization": zero, "gradient_clipping": 1.0,
            "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, "bf16": {"enabled": self.dtype == torch.bfloat16},
            "data_types": {"grad_accum_dtype": "fp32"}, "steps_per_print": 10**9,
        }  # fmt: skip
        optimizer = torch.optim.AdamW([p for _, p in self.params], foreach=True)
        return deepspeed.initialize(model=self.packed, optimizer=optimizer, config=config)[0]

    def start(self, optim: Optim) -> None:
        self.engine.optimizer.clip_grad = optim.clip_norm
        for group in self.engine.optimizer.param_groups:
            group.update(lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay)
        for state in self.engine.optimizer.optimizer.state.values():
            for value in state.values():
                value.zero_()

    def backward(self, loss: Tensor, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.world)

    def update(self, lr: float) -> float:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm())
        if not abs(norm) < float("inf"):
            raise BadGradient("under DeepSpeed, which had stepped when it said so: go on from the last checkpoint with --resume")
        return norm

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        read = importlib.import_module("deepspeed.utils").safe_get_full_fp32_param
        for name, p in self.params:
            yield name, read(p).detach().view(self.shapes[name]).to(self.dtype)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        ds = importlib.import_module("deepspeed.utils")
        count = torch.tensor(float(self._steps()))
        for name, p in self.params:
            shape = self.shapes[name]
            if self.dtype == torch.bfloat16:
                yield f"master/{name}", ds.safe_get_full_fp32_param(p).detach().view(shape)
            if count:
                yield f"step/{name}", count.clone()
                for key in ("exp_avg", "exp_avg_sq"):
                    yield f"{key}/{name}", ds.safe_get_full_optimizer_state(p, key).detach().view(shape)

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor], state: dict[str, Tensor]) -> None:
        ds = importlib.import_module("deepspeed.utils")
        gathered = importlib.import_module("deepspeed").zero.GatheredParameters
        for name, p in self.params:
            with gathered([p], modifier_rank=0) if self.stage == 3 else contextlib.nullcontext():  # the working weights
                if self.stage < 3 or torch.distributed.get_rank() == 0:
                    p.copy_(weights[name])
            ds.safe_set_full_fp32_param(p, state.get(f"master/{name}", weights[name]).float().to(p.device))  # and the optimizer's
            for key in ("exp_avg", "exp_avg_sq"):
                if f"{key}/{name}" in state:
                    ds.safe_set_full_optimizer_state(p, state[f"{key}/{name}"].float().to(p.device), key)
        done = next((v for k, v in state.items() if k.startswith("step/")), torch.tensor(0.0))
        for entry in self.engine.optimizer.optimizer.state.values():
            entry["step"] = torch.as_tensor(float(done))

    def _steps(self) -> float:
        counts = {float(entry["step"]) for entry in self.engine.optimizer.optimizer.state.values() if "step" in entry}
        assert len(counts) <= 1, counts
        return counts.pop() if counts else 0.0

    def facts(self) -> dict[str, Any]:
        """Stage 3 shards the weights; stages 1 and 2 hold them whole and shard the fp32 masters and moments, which is what is counted."""
        if self.stage == 3:
            mine = 4 * sum(p.ds_tensor.numel() for _, p in self.params)  # type: ignore[attr-defined]
        else:
            mine = sum(p.numel() * p.element_size() for group in self.engine.optimizer.optimizer.param_groups for p in group["params"])
        return {
            "strategy": f"zero{self.engine.zero_optimization_stage()}", "offload": self.offload, "weight_bytes_rank": mine,
            "weight_bytes_all": 4 * sum(shape.numel() for shape in self.shapes.values()),
        }  # fmt: skip
