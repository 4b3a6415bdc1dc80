"""Views, batches and policies written by hand, for the tests of credit, losses and packing. fp64 unless said."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmrl import credit, losses
from llmrl.batch import Outputs, TokenBatch, numbers
from llmrl.credit import Credit, Transform, View

GOLDEN = Path(__file__).parent / "golden"
ALPHABET = "0123456789+-*=;#() "


def goldens(*files: str) -> list[dict[str, Any]]:
    """The entries of tests/golden/<file>.json."""
    return [e for f in files for e in json.loads((GOLDEN / f"{f}.json").read_text(encoding="utf-8"))]


def f64(values: Any) -> Tensor:
    """A double tensor; None becomes NaN."""

    def fill(x: Any) -> Any:
        return [fill(v) for v in x] if isinstance(x, list | tuple) else float("nan") if x is None else x

    return torch.tensor(fill(values), dtype=torch.float64)


def flat(rows: Sequence[Sequence[float]]) -> Tensor:
    """Ragged rows -> [T] double."""
    return f64([x for row in rows for x in row])


def make_view(
    rewards: Sequence[float | None], cohorts: Sequence[int], lengths: Sequence[int] | None = None, *, max_new_tokens: int = 0,
    streams: dict[str, list[list[float]]] | None = None, **rest: Any,
) -> View:  # fmt: skip
    """A View of samples with these rewards (None = unscored), cohorts and lengths (default 1 token each)."""
    n = len(rewards)
    lengths_S = torch.tensor(lengths or [1] * n)
    return View(
        reward_S=f64([0.0 if r is None else r for r in rewards]), scored_S=torch.tensor([r is not None for r in rewards]),
        cohort_S=torch.tensor(cohorts), length_S=lengths_S, truncated_S=torch.zeros(n, dtype=torch.bool),
        sample_T=torch.repeat_interleave(torch.arange(n), lengths_S), max_new_tokens=max_new_tokens,
        streams={name: flat(rows) for name, rows in (streams or {}).items()}, **rest,
    )  # fmt: skip


def make_credit(chain: dict[str, list[list[Any]]]) -> Credit:
    """{"sample": [["center", {}], ...], "token": [...]} -> Credit."""

    def build(spec: list[list[Any]]) -> tuple[Transform, ...]:
        return tuple(getattr(credit, name)(**kwargs) for name, kwargs in spec)

    return Credit(build(chain.get("sample", [])), build(chain.get("token", [])))


def make_batch(
    logp: Sequence[Sequence[float]], adv: Sequence[Any], *, old: Any = None, ref: Any = None, behavior: Any = None, entropy: Any = None,
    weight: Sequence[float] | None = None, cohorts: Sequence[int] | None = None,
) -> tuple[TokenBatch, Outputs]:  # fmt: skip
    """Ragged rows of log-probs and one advantage a row (or a row of them) -> (batch, outputs). logp_T and entropy_T take gradients."""
    lengths = [len(row) for row in logp]
    n, none = len(logp), torch.zeros(0, dtype=torch.long)
    adv_T = flat([list(a) if isinstance(a, list | tuple) else [a] * k for a, k in zip(adv, lengths, strict=True)])
    logp_T = flat(logp).requires_grad_()
    batch = TokenBatch(
        tokens_T=torch.zeros(sum(lengths), dtype=torch.long), sample_T=torch.repeat_interleave(torch.arange(n), torch.tensor(lengths)),
        adv_T=adv_T, behavior_logp_T=flat(behavior) if behavior is not None else torch.full_like(adv_T, torch.nan),
        weight={"policy": flat([[w] * k for w, k in zip(weight or [1.0] * n, lengths, strict=True)])}, stream={},
        reward_S=torch.zeros(n, dtype=torch.float64), cohort_S=torch.tensor(numbers(cohorts or range(n))),
        group_S=torch.arange(n), ids_P=none, positions_P=none, source_T=none, index_RL=none[None], pick_P=none,
    )  # fmt: skip
    out = Outputs(
        logp_T, logp_T.detach() if old is None else flat(old), None if ref is None else flat(ref),
        None if entropy is None else flat(entropy).requires_grad_(),
    )  # fmt: skip
    return batch, out


def make_loss(spec: list[Any]) -> losses.LossFn:
    """["pg_clip", {"low": 0.2}] or ["mismatch", {...}, inner spec] -> loss function."""
    name, kwargs, *inner = spec
    return getattr(losses, name)(*(make_loss(i) for i in inner), **kwargs)


def tiny_policy(**changes: Any) -> Any:
    """A tiny Llama with 4 query and 2 key heads and a character tokenizer, fp32."""
    from llmrl.models import load_policy
    from llmrl.recipe import Model, Tiny

    shape: dict[str, Any] = {"hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 128, "alphabet": ALPHABET, "max_length": 256}
    return load_policy(Model(path="tiny", tiny=Tiny(**{**shape, **changes})))
