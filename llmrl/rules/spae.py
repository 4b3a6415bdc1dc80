"""SPAE, step potential advantage estimation (Wu et al., arXiv:2601.03823): short probes after each reasoning step shape the credit of its tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from llmrl import credit as c
from llmrl import losses
from llmrl.records import Group, Prompt, Sample
from llmrl.rollout import RolloutIO, dynamic_groups, sample_groups
from llmrl.rules.base import Collect, Rule, Term

PROBE = "**Final Answer**\n\\boxed{"


def spae(
    *, alpha: float = 0.5, xi: float = 0.5, probes: int = 5, probe_tokens: int = 10, probe_temperature: float = 1.0, probe: str = PROBE,
    boundary: str = ".\n\n", end: str = "</think>", saturated: float = 0.9, max_probes: int = 16, dynamic_rounds: int = 10, low: float = 0.2,
    high: float = 0.28, eps: float = 1e-8, mask_truncated: bool = False,
) -> Rule:  # fmt: skip
    """dapo whose token credit is damped once a probe finds the answer settled, and raised for steps that settle it. arXiv:2601.03823.

    Phi_k = 1.5 Acc Conf + 0.5 Acc - Conf after step k (text up to `boundary`);  f = 1 - alpha (1 - exp(-C)), C = earlier steps with Phi > saturated
    g = exp(d) - mean exp(d), d = Phi_k - Phi_(k-1), min-max scaled over the steps of the batch;  A = whiten((R - mean_group) f + xi g)
    Acc: mean probability of the reference answer's tokens behind `probe`; Conf: mean over `probes` short samples of exp(-mean entropy). Equations through
    notes. Differs from grpo: (1) that credit, no group std, whitened over all tokens and ranks (population std), (2) dapo's loss and dynamic sampling.
    Differs from the paper: the entropy of a probe's tokens is its one-sample estimate -log p, which is why probe_temperature is 1 (script: 0.6).
    alpha, xi 0.5, 5 probes of 10 tokens are the paper's. OUR CHOICE: saturated 0.9 (the script's "solved"), max_probes evenly spaced boundaries a sample,
    the others take the next probed Phi; only groups of mixed scores are probed; tokens behind the last boundary, texts without one and rows without an
    answer keep f = 1, g = 0; each step counts once in min, max and mean, over all ranks; Phi_0 = Phi_1. Metrics rule/potential, rule/probes.
    """
    if not 0 <= alpha <= 1 or min(probes, probe_tokens, max_probes) < 1 or not boundary:
        raise ValueError(f"spae: alpha = {alpha} must lie in [0, 1]; probes, probe_tokens and max_probes at least 1; boundary a text")
    how = {"n": probes, "tokens": probe_tokens, "temperature": probe_temperature, "probe": probe, "boundary": boundary, "end": end, "most": max_probes}
    sampled = partial(dynamic_groups, max_rounds=dynamic_rounds) if dynamic_rounds else sample_groups
    return Rule(
        credit=c.Credit((c.center(),), (_potentials(alpha, xi, saturated), _whiten(eps))), loss=(Term(losses.pg_clip(low, high)),),
        collect=partial(_probed_groups, sampled=partial(sampled, mask_truncated=mask_truncated), how=how),
    )  # fmt: skip


spae.cost = "at every probed step boundary `probes` short samples and one scoring forward"  # type: ignore[attr-defined]


def potential(acc: float, conf: float) -> float:
    """Phi in [-1, 1]: about 0 exploring, 1 right and sure, -1 wrong and sure."""
    return 1.5 * acc * conf + 0.5 * acc - conf


def damping(phi: Sequence[float], alpha: float, saturated: float) -> list[float]:
    """f of each step."""
    return [1 - alpha * (1 - math.exp(-sum(p > saturated for p in phi[:k]))) for k in range(len(phi))]


def _potentials(alpha: float, xi: float, saturated: float) -> c.Transform:
    """a_T f + xi g. Streams "step" (-1: none) and "potential" of each token's step."""

    def f(a_T: Tensor, view: c.View) -> Tensor:
        if "step" not in view.streams:
            _ = view.gather([]), view.gather([])  # other ranks may have steps
            return a_T
        on_T = view.scored_S[view.sample_T] & (view.streams["step"] >= 0)
        key_T = view.sample_T * 2**20 + view.streams["step"].nan_to_num(0.0).long()
        keys, step_T = torch.unique(key_T[on_T], return_inverse=True)  # steps in the order of the samples
        phi = torch.zeros(len(keys), dtype=torch.float64)
        phi[step_T] = view.streams["potential"][on_T]
        first = torch.ones(len(keys), dtype=torch.bool)
        first[1:] = keys[1:] // 2**20 != keys[:-1] // 2**20
        gain = torch.where(first, 0.0, phi - phi.roll(1))
        ends = [x for rank in view.gather([float(gain.min()), float(gain.max())] if len(gain) else []) for x in rank]
        span = max(ends) - min(ends) if ends else 0.0
        scaled = (gain - min(ends)) / span if span > 1e-12 else torch.zeros_like(gain)
        sums = [pair for pair in view.gather([float(scaled.exp().sum()), float(len(gain))] if len(gain) else []) if pair]
        mean = sum(s for s, _ in sums) / max(1.0, sum(n for _, n in sums))
        damp = torch.tensor([x for own in _by_sample(phi, first) for x in damping(own, alpha, saturated)], dtype=torch.float64)
        out = a_T.clone()
        out[on_T] = a_T[on_T] * damp[step_T] + xi * (scaled.exp() - mean)[step_T]
        return out

    return c.stateless("step_potential", f)


def _by_sample(phi: Tensor, first: Tensor) -> list[list[float]]:
    return [phi[a:b].tolist() for a, b in pairwise([*torch.nonzero(first)[:, 0].tolist(), len(phi)])]


def _whiten(eps: float) -> c.Transform:
    """(a - mean) / (population std + eps) over all scored tokens and ranks."""

    def f(a_T: Tensor, view: c.View) -> Tensor:
        w_T = view.scored_S[view.sample_T].double()
        mean, var = c.moments(a_T, w_T, view)
        n = view.all_sum(w_T.sum()[None])[0]
        return (a_T - mean) / ((var * (n - 1) / n.clamp(min=1)).clamp(min=0).sqrt() + eps)

    return c.stateless("whiten_population", f)


def boundaries(sample: Sample, io: RolloutIO, boundary: str, end: str) -> list[int]:
    """Numbers of tokens up to and with each that completes a `boundary` in the text; none behind `end`."""
    text, found, seen = "", [], 0
    for k, token in enumerate(sample.token_ids):
        text += io.chat.text([token])
        if end and end in text:
            break
        if (count := text.count(boundary)) > seen:
            seen = count
            found.append(k + 1)
    return found


async def _probed_groups(prompts: Sequence[Prompt], io: RolloutIO, *, sampled: Collect, how: dict[str, Any]) -> list[Group]:
    groups = await sampled(prompts, io)
    probe_ids = io.chat.completion_ids(how["probe"])[:-1]
    short = replace(io.sampling, max_new_tokens=how["tokens"], temperature=how["temperature"], stop=("}",))
    jobs: list[tuple[Sample, list[int], list[int], list[int]]] = []  # sample, its boundaries, those probed, gold
    for g in groups:
        mixed = len({s.reward for s in g.samples if s.reward is not None}) > 1 and g.prompt.answer is not None
        for s in g.samples:
            ends = boundaries(s, io, how["boundary"], how["end"]) if mixed and s.reward is not None else []
            chosen = sorted({ends[round((i + 1) * len(ends) / min(len(ends), how["most"])) - 1] for i in range(min(len(ends), how["most"]))})
            s.streams["step"] = s.streams["potential"] = [-1.0] * len(s.token_ids)
            if ends:
                jobs.append((s, ends, chosen, io.chat.completion_ids(g.prompt.answer or "")[:-1]))
    asked = [(s, at, gold) for s, _, chosen, gold in jobs for at in chosen]
    contexts = [[*s.context_ids, *s.token_ids[:at], *probe_ids] for s, at, _ in asked]
    done = io.sample([x for x in contexts for _ in range(how["n"])], [(s.id, "probe", at, j) for s, at, _ in asked for j in range(how["n"])], short)
    scored = io.score(contexts, [gold for *_, gold in asked]) if asked else []
    phi: dict[tuple[str, int], float] = {}
    for k, ((s, at, _), logp) in enumerate(zip(asked, scored, strict=True)):
        own = done[k * how["n"] : (k + 1) * how["n"]]
        conf = sum(math.exp(sum(d.logprobs) / max(1, len(d.logprobs))) for d in own) / how["n"]
        phi[s.id, at] = potential(sum(map(math.exp, logp)) / max(1, len(logp)), conf)
    for s, ends, chosen, _ in jobs:
        begins, rest = [0, *ends[:-1]], len(s.token_ids) - ends[-1]
        values = [phi[s.id, next(at for at in chosen if at >= e)] for e in ends]
        s.streams["step"] = [float(j) for j, (a, b) in enumerate(zip(begins, ends, strict=True)) for _ in range(b - a)] + [-1.0] * rest
        s.streams["potential"] = [v for v, a, b in zip(values, begins, ends, strict=True) for _ in range(b - a)] + [0.0] * rest
        io.note("potential", sum(values), len(values))
    io.note("probes", len(asked), 0)
    return groups
