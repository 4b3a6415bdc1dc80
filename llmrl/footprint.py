"""Bytes that training takes on one rank, by strategy: arithmetic, no measurement. `llmrl check` prints it; docs/scale.md has a table of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight in 4 bits: its code, and its shares of a block's scale and of that scale's own scale (quantize.py)."""
Strategy = Literal["ddp", "fsdp2", "zero1", "zero2", "zero3"]


@dataclass(frozen=True)
class Footprint:
    """GB (1e9 bytes) on one rank. Activations and the engine's key-value cache are not in it."""

    weights: float
    """Working weights."""
    gradients: float
    optimizer: float
    """AdamW's two moments, and fp32 masters where the working weights are bf16."""
    reference: float
    engine: float
    """The copy that an engine on this rank generates with, where it cannot use the learner's own."""
    cpu: float
    """In CPU memory, under offload."""

    @property
    def device(self) -> float:
        """In the device's memory."""
        return self.weights + self.gradients + self.optimizer + self.reference + self.engine


def footprint(
    parameters: float, *, bf16: bool = True, strategy: Strategy = "ddp", world: int = 1, learning: float | None = None, reference: bool = False,
    offload: bool = False, replica: bool | None = None, quantized: float = 0.0,
) -> Footprint:  # fmt: skip
    """What `parameters` weights take, of which `learning` learn (None = all; with LoRA the adapters, which come on top).

    Bytes a weight: bf16 works on 2 and keeps fp32 masters (4), gradients summed in fp32 (4), two fp32 moments (8); float32 has 4, 4, 8
    and no masters (DeepSpeed keeps them there too). ZeRO stage 1 divides masters and moments by the number of ranks, stage 2 the
    gradients too, stage 3 the weights too; FSDP2 shards the fp32 masters themselves (4 a weight, frozen ones included), and gathers a
    layer at a time, which is not counted. offload: the optimizer goes to CPU memory, at zero3 the weights too. replica: the HF engine's
    whole copy beside a learner that is not ddp (the default); False with vLLM servers. quantized: so many of the frozen weights are held
    in 4 bits (QLoRA: 0.516 bytes each, their scales included).
    """
    n, frozen = (parameters, 0.0) if learning is None else (learning, parameters - quantized)
    width = 2.0 if bf16 else 4.0
    part = {"ddp": (1, 1, 1), "zero1": (1, 1, world), "zero2": (1, world, world), "zero3": (world,) * 3, "fsdp2": (world,) * 3}[strategy]
    held = 4.0 if strategy == "fsdp2" else width
    masters = 4.0 if strategy.startswith("zero") or (bf16 and strategy == "ddp") else 0.0
    weights = (held * (n + frozen) + NF4 * quantized) / part[0]
    optimizer = (8.0 + masters) * n / part[2]
    copy = (strategy != "ddp") if replica is None else replica
    ref = 0.0 if not reference or learning is not None else held * parameters / part[0]
    cpu = (optimizer + (weights if strategy == "zero3" else 0.0)) if offload else 0.0
    if offload:
        optimizer, weights = 0.0, 0.0 if strategy == "zero3" else weights
    return Footprint(*(x / 1e9 for x in (weights, 4.0 * n / part[1], optimizer, ref, width * (n + frozen) + NF4 * quantized if copy else 0.0, cpu)))
