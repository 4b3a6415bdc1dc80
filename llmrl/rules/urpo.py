"""URPO, unified reward and policy optimisation (Lu, Wang, Chen, Tang; arXiv:2507.17515): one network answers and judges answers, in one GRPO loop."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from llmrl.records import Group, InputError, Prompt, Sample, Verdict
from llmrl.rollout import RolloutIO, complete, make_sample, sample_groups
from llmrl.rules import grpo as family
from llmrl.rules.base import Rule
from llmrl.templates import Template, read_template

KINDS = ("verif", "pref", "open")
LOW, HIGH = 1.0, 10.0
_LINE = re.compile(r"[ \t]{0,9}(\d{1,4})[ \t]{0,9}:[ \t]{0,9}(\d{1,4}(?:\.\d{1,4})?)[ \t]{0,9}")


def urpo(
    *, base: Path, kind: str = "kind", candidates: str = "candidates", ranking: str = "ranking", template: str = "chat", warmup_steps: int = 0, calls: int = 1,
    referee_tokens: int | None = None, low: float = 0.2, high: float = 0.2, std_eps: float = 1e-6, kl: float = 0.0, mask_truncated: bool = False,
) -> Rule:  # fmt: skip
    """grpo on three kinds of rows: answers that a verifier judges, judgements of known order, and answers that the policy judges. arXiv:2507.17515.

    column `kind`  "verif" (or no such column): r = the verifier's score
    "pref": a group of referee outputs, each scores all of the column `candidates` (a list of texts); with g the column `ranking` (numbers, higher is better)
            r = tau(g, s) = 2/(N(N-1)) sum_(i<j) sign(g_i - g_j) sign(s_i - s_j) (Kendall's tau-a; ties give 0); -1 where the output cannot be read
    "open": a group of answers; the same weights then see all of them together and score each with q in 1..10:  r = (q - 1) / 9, no gradient through q and
            none on that output; unjudged where it cannot be read
    A = (r - mean) / (std + std_eps) within each row's group, one clipped loss over all.
    Differs from grpo: (1) those rewards. The paper's formulas were not found: tau, the scale and what is unreadable are OUR CHOICE, and so is all that follows.
    A referee output is read if it has exactly one line (or ;-part) "i: score" for each candidate, scores in 1..10; other lines are ignored. Candidates are
    shown in an order drawn for each visit, and their scores put back. Open rows train nothing in the first warmup_steps steps. Their referee is greedy;
    with `calls` > 1 it is sampled so often, each time in another order, and the readable scores are averaged. The mixture is that of the rows.
    template: "chat", "tiny", or a file with {question}, {answers}, {n}. No guard against a policy that learns to please itself but rule/<kind>/reward,
    referee/accuracy (pair accuracy on pref rows, before they are trained on), referee/readable_share (of both kinds), and open/score, the verifier's
    score of open rows that have an answer, which trains nothing.
    """
    if warmup_steps < 0 or calls < 1 or (referee_tokens or 1) < 1:
        raise ValueError(f"urpo: warmup_steps = {warmup_steps} must be at least 0, calls = {calls} and referee_tokens = {referee_tokens} at least 1")
    told = read_template(template, kind="urpo", fields=("answers", "n"), base=base, needs=("question", "answers"))
    how = _Referee(told, kind, candidates, ranking, calls, referee_tokens)
    plain = family.grpo(low=low, high=high, std_eps=std_eps, kl=kl)
    return replace(plain, collect=partial(_three_kinds, how=how, warmup_steps=warmup_steps, mask_truncated=mask_truncated))


urpo.cost = "`calls` referee outputs for every open row"  # type: ignore[attr-defined]


def tau(g: Sequence[float], s: Sequence[float]) -> float:
    """Kendall's tau-a of two scorings, in [-1, 1]."""
    pairs = [(i, j) for i in range(len(g)) for j in range(i)]
    return sum(((g[i] > g[j]) - (g[i] < g[j])) * ((s[i] > s[j]) - (s[i] < s[j])) for i, j in pairs) / len(pairs)


def read_scores(text: str, n: int) -> list[float] | None:
    """The scores of candidates 1..n in a referee's output; None where it is no full and unambiguous scoring."""
    found = [(int(m[1]), float(m[2])) for line in re.split(r"[\n;]", text) if (m := _LINE.fullmatch(line.rstrip("\r")))]
    if sorted(i for i, _ in found) != list(range(1, n + 1)) or any(not LOW <= q <= HIGH for _, q in found):
        return None
    return [q for _, q in sorted(found)]


@dataclass(frozen=True)
class _Referee:
    template: Template
    kind: str
    candidates: str
    ranking: str
    calls: int
    tokens: int | None

    def kind_of(self, p: Prompt) -> str:
        """Raises InputError for a row whose columns do not fit."""
        kind = p.meta.get(self.kind, "verif")
        if kind not in KINDS:
            raise InputError(f"row {p.id}: {self.kind} is {kind!r}; expected {', '.join(KINDS)}")
        texts, g = p.meta.get(self.candidates), p.meta.get(self.ranking)
        if kind == "pref" and not (isinstance(texts, list) and isinstance(g, list) and len(texts) == len(g) > 1):
            raise InputError(f"row {p.id}: kind pref needs {self.candidates} (two or more texts) and {self.ranking} (as many numbers, higher is better)")
        return kind

    def ask(self, p: Prompt, texts: Sequence[str], io: RolloutIO, call: int = 0) -> tuple[list[int], list[int]]:
        """(context, order): order[k] is the candidate that is shown as number k + 1."""
        order = io.rng("urpo", p.visit_id, call).permutation(len(texts)).tolist()
        shown = "\n".join(f"{k + 1}: {texts[j]}" for k, j in enumerate(order))
        return io.chat.prompt_ids(self.template.messages(p, answers=shown, n=str(len(texts)))), order

    def read(self, text: str, order: Sequence[int], io: RolloutIO) -> list[float] | None:
        """Scores by candidate, whatever the order they were shown in."""
        shown = read_scores(text, len(order))
        io.note("referee/readable_share", float(shown is not None))
        return None if shown is None else [q for _, q in sorted(zip(order, shown, strict=True))]


async def _three_kinds(prompts: Sequence[Prompt], io: RolloutIO, *, how: _Referee, warmup_steps: int, mask_truncated: bool) -> list[Group]:
    kinds = [how.kind_of(p) for p in prompts]
    verif, pref, own = ([p for p, k in zip(prompts, kinds, strict=True) if k == kind] for kind in KINDS)
    waiting, own = (own, []) if io.step <= warmup_steps else ([], own)
    groups = await sample_groups(verif, io, mask_truncated=mask_truncated) if verif else []
    groups += _refereed(pref, io, how, mask_truncated) + await _self_scored(own, io, how, mask_truncated)
    for g in groups:
        rewards = [s.reward for s in g.samples if s.reward is not None]
        if rewards:
            io.note(f"{how.kind_of(g.prompt)}/reward", sum(rewards), len(rewards))
    for p in waiting:  # one token of weight 0, so that the step has its shape
        none = Sample(f"{p.visit_id}/none", p.id, io.chat.prompt_ids(p.messages), [io.chat.tokenizer.eos_token_id], None, io.version, role="none")
        groups.append(Group(p, [replace(none, weights={"policy": 0.0})]))
    at = {g.prompt.visit_id: g for g in groups}
    return [at[p.visit_id] for p in prompts]


def _refereed(prompts: Sequence[Prompt], io: RolloutIO, how: _Referee, mask_truncated: bool) -> list[Group]:
    """Groups of judgements, rewarded by their agreement with the known ranking. The verdict holds the pair accuracy, (tau + 1) / 2."""
    asked, groups = [how.ask(p, p.meta[how.candidates], io) for p in prompts], [Group(p, []) for p in prompts]
    for p, group, (context, order), done in zip(prompts, groups, asked, complete(prompts, [c for c, _ in asked], io), strict=True):
        for i, d in enumerate(done):
            s = how.read(d.text, order, io)
            t = -1.0 if s is None else tau(p.meta[how.ranking], s)
            if s is not None:
                io.note("referee/accuracy", (t + 1) / 2)
            verdict = Verdict(0.0, "no_answer") if s is None else Verdict((t + 1) / 2, detail=f"scores {s}")
            group.samples.append(replace(make_sample(p, i, context, d, verdict, mask_truncated=mask_truncated), role="referee", reward=t))
    return groups


async def _self_scored(prompts: Sequence[Prompt], io: RolloutIO, how: _Referee, mask_truncated: bool) -> list[Group]:
    """Groups of answers, rewarded by what the weights that sample now say of them."""
    contexts = [io.chat.prompt_ids(p.messages) for p in prompts]
    done = complete(prompts, contexts, io)
    asked = [(g, m, *how.ask(p, [d.text for d in done[g]], io, m)) for g, p in enumerate(prompts) for m in range(how.calls)]
    sampling = replace(io.sampling, temperature=0.0 if how.calls == 1 else io.sampling.temperature, max_new_tokens=how.tokens or io.sampling.max_new_tokens)
    said = io.sample([context for *_, context, _ in asked], [(prompts[g].visit_id, "referee", m) for g, m, *_ in asked], sampling)
    read = [(g, how.read(d.text, order, io)) for (g, *_, order), d in zip(asked, said, strict=True)]
    groups = []
    for g, p in enumerate(prompts):
        mean = [sum(q) / len(q) for q in zip(*(s for k, s in read if k == g and s is not None), strict=True)]
        verdicts = [Verdict((q - LOW) / (HIGH - LOW)) for q in mean] or [Verdict(None, "error", detail="no referee output could be read")] * io.group
        pairs = zip(done[g], verdicts, strict=True)
        groups.append(Group(p, [make_sample(p, i, contexts[g], d, v, mask_truncated=mask_truncated) for i, (d, v) in enumerate(pairs)]))
    known = [(p, d.text) for p, own in zip(prompts, done, strict=True) if p.answer is not None for d in own]
    judged = [v.score for v in (await io.verify(known) if known else []) if v.score is not None]
    if judged:
        io.note("open/score", sum(judged), len(judged))
    return groups
