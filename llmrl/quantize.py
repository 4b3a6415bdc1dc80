"""QLoRA (arXiv:2305.14314): the frozen weights of a model's linear layers in 4 bits, by bitsandbytes; adapters learn on top of them.

A weight is cut into blocks of 64, each stored as 4-bit codes of the NormalFloat table and a scale of 8 bits (double quantisation: the
scales are quantised themselves, in blocks of 256). Forward and backward dequantise a layer while it runs. Embeddings, norms and the
vocabulary head stay as they are. Works on GPU and on CPU (bitsandbytes 0.50, measured).

The adapters fit the *dequantised* weights, not those that the model was loaded with. So the folder of the adapters says how its base was
quantised (`base_quantization.json`), and whoever merges them rounds the base in the same way first.
"""

from __future__ import annotations

import importlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmrl.records import InputError

TOLD = "base_quantization.json"


def bitsandbytes() -> Any:
    """The package. InputError with the mend where it is missing or does not load."""
    speaker = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = speaker.level
    speaker.setLevel(logging.ERROR)  # it warns of a kernel for inference that we never use
    try:
        return importlib.import_module("bitsandbytes")
    except (ImportError, OSError, RuntimeError) as e:
        raise InputError(f'model.lora.quantize = "nf4" needs bitsandbytes ({str(e).splitlines()[0]}); pip install \'llmrl[qlora]\'') from e
    finally:
        speaker.setLevel(level)


def quantize(model: Any, device: torch.device | str) -> None:
    """Puts the model's linear layers but the vocabulary head into 4 bits on `device`, one at a time; the rest stays where it is.

    The codes depend on the weights' values in the dtype that they have now. InputError where there is nothing to quantise, or where the bulk
    of the weights lies outside linear layers (experts kept as one 3-D tensor).
    """
    linear = _linear(model)
    stacked = [name for name, p in model.named_parameters() if p.dim() > 2]
    if not linear or stacked:
        why = f"{stacked[0]} is a stack of matrices, which is not quantised" if stacked else "it has no linear layers"
        raise InputError(f"model.lora.quantize: {type(model).__name__} cannot be quantised: {why}; leave model.lora.quantize out")
    for parent, name, layer in linear:
        setattr(parent, name, _four_bit(layer, device))
    model.is_loaded_in_4bit = True  # peft puts adapters of its own kind on such layers


def _linear(model: Any) -> list[tuple[nn.Module, str, nn.Linear]]:
    head = model.get_output_embeddings()
    return [
        (parent, name, layer) for parent in model.modules() for name, layer in parent.named_children() if isinstance(layer, nn.Linear) and layer is not head
    ]  # fmt: skip


def _four_bit(layer: nn.Linear, device: torch.device | str) -> nn.Module:
    bnb, dtype = bitsandbytes(), layer.weight.dtype
    new = bnb.nn.Linear4bit(
        layer.in_features, layer.out_features, bias=layer.bias is not None, compute_dtype=dtype, compress_statistics=True, quant_type="nf4", device="meta"
    )
    new.weight = bnb.nn.Params4bit(layer.weight.detach(), requires_grad=False, compress_statistics=True, quant_type="nf4", module=new).to(device)
    if layer.bias is not None:
        new.bias = nn.Parameter(layer.bias.detach().to(device), requires_grad=False)
    # On CPUs with AVX512-BF16 its first forward in eval mode would repack the weight for good: from then on every product is in bf16, fp32 models
    # included, and has no gradient with respect to its input.
    new.support_avx512bf16_for_cpu = False
    return new.train(layer.training)


def dequantized(weight: Tensor) -> Tensor:
    """The matrix [out, in] that a 4-bit weight stands for, in the dtype it was quantised from; any other weight as it is. Detached."""
    state = getattr(weight, "quant_state", None)
    return weight.detach() if state is None else bitsandbytes().functional.dequantize_4bit(weight.data, state)


@torch.no_grad()
def round_weights(model: Any) -> None:
    """Every weight that quantize() would take becomes what it would stand for, in place: the plain model that QLoRA adapters fit."""
    bnb = bitsandbytes()
    for _, _, layer in _linear(model):
        codes, state = bnb.functional.quantize_4bit(layer.weight.data.contiguous(), compress_statistics=True, quant_type="nf4")
        layer.weight.copy_(bnb.functional.dequantize_4bit(codes, state))


def sizes(model: nn.Module) -> tuple[int, int, int]:
    """(weights, those of them in 4 bits, bytes they all take), tied ones once."""
    weights = packed = held = 0
    for p in model.parameters():
        state = getattr(p, "quant_state", None)
        n = p.numel() if state is None else state.shape.numel()
        parts = [p] if state is None else [p, state.absmax, *([state.state2.absmax] if state.nested else [])]
        weights, packed = weights + n, packed + (n if state is not None else 0)
        held += sum(x.numel() * x.element_size() for x in parts)
    return weights, packed, held


def tell(folder: Path, how: str, dtype: torch.dtype) -> None:
    """Writes beside the adapters how their base was quantised, and from which dtype."""
    (folder / TOLD).write_text(json.dumps({"quantize": how, "dtype": str(dtype).removeprefix("torch.")}) + "\n", encoding="utf-8")


def told(folder: Path) -> torch.dtype | None:
    """The dtype that the base of these adapters was quantised from; None = it was not. InputError for a way that is not known here."""
    file = folder / TOLD
    if not file.is_file():
        return None
    found = json.loads(file.read_text(encoding="utf-8"))
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(found.get("dtype"))
    if found.get("quantize") != "nf4" or dtype is None:
        raise InputError(f"{file}: adapters on a base quantised as {found}; this version knows nf4 from float32 or bfloat16")
    return dtype
