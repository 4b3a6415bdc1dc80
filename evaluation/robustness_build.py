"""Builds the frozen test set of the robustness evaluation from a base model; protocols of section 6 of the GASP specification.

That specification was written from the paper's abstract: the names recoverability and diagnosability come from third-party summaries, the
procedures are our choice, except for the off-trajectory distraction (`distract`), which follows arXiv:2510.06410.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from llmrl.evaluation.corruptions import RULES, cut_back, pick, split_dress
from llmrl.evaluation.robustness_items import Collector, Diagnose, Options, Score
from llmrl.evaluation.robustness_set import BaseTrace, Item, Subject
from llmrl.records import Completion, Prompt, Request, Verdict

Pollute = Callable[[Sequence[tuple[Prompt, str, str]]], list[list[str | None]]]
"""(prompt, prefix, step) of every site -> candidate replacements of the step; None = a reply from which none could be read."""


@dataclass(frozen=True)
class _Solved:
    """A correct trace of the base: what is corrupted."""

    prompt: Prompt
    context: list[int]
    ids: list[int]
    ends: list[int]

    def start(self, k: int) -> int:
        return self.ends[k - 1] if k else 0


@dataclass(frozen=True)
class _Site:
    solved: _Solved
    r: float
    k: int


@dataclass
class _Candidate:
    site: _Site
    source: str
    text: str
    """The step as it would stand in the trace, blanks and separator included."""
    ids: list[int]
    """Prefix and step."""
    nll: float | None = None
    continued: Completion | None = None
    effective: bool = False


class Builder(Collector):
    """One use: `build` returns (header, problems, items, traces), ready for `write_set`."""

    def __init__(self, base: Subject, score: Score, options: Options, polluters: dict[str, Pollute], diagnose: Diagnose):
        super().__init__(base, score, options, diagnose)
        self.polluters = polluters
        self.shares: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.tau: float | None = None

    def build(self, prompts: Sequence[Prompt], rows: Sequence[dict[str, Any]] = ()) -> tuple[dict[str, Any], list[Prompt], list[Item], list[BaseTrace]]:
        """rows: of ProcessBench, normalised: id, source, problem, steps, first_error_step (from 0; -1 = none)."""
        solved, traces, right = self.solve(prompts)
        for p in prompts:
            self.add("clean", p.id, p.messages)
        sites = list(self.sites(solved))
        made = self.candidates(sites)
        passed = self.gated(made)
        self.continue_greedily(passed)
        kept = self.recover(passed)
        self.distract(solved)
        self.diagnose_own(kept, solved)
        extra = self.diagnose_rows(rows)
        ranked = sorted((c for c in passed if c.source in RULES), key=lambda c: (c.source == "number", c.site.r))
        self.perturbed(prompts, {c.site.solved.prompt.id: self.text(c.ids) for c in ranked})  # the last one stays: a late changed number
        header = {
            "base": self.base.name, "tokenizer": self.base.digest, "seed": self.o.seed, "sampling": asdict(self.o.sampling), "samples": self.o.samples,
            "options": {k: v for k, v in asdict(self.o).items() if k not in ("sampling", "samples", "seed")},
            "solved": {"problems": len(prompts), "solved": len(solved), "least": self.o.solve_min, "of": self.o.solve_samples, "mean_right": right},
            "sources": [*self.polluters, *RULES], "coherence_limit_nats": self.tau, "shares": {k: dict(v) for k, v in sorted(self.shares.items())},
            "left_out": {k: dict(v) for k, v in sorted(self.left_out.items())},
        }  # fmt: skip
        return header, [*prompts, *extra], self.items, traces

    # ------------------------------------------------ clean traces

    def solve(self, prompts: Sequence[Prompt]) -> tuple[list[_Solved], list[BaseTrace], float | None]:
        """A correct trace of each problem that the base solves often enough, fixed traces for drift, the base's share of right samples."""
        jobs = [(p, i) for p in prompts for i in range(self.o.solve_samples)]
        context = {p.id: list(self.base.chat.prompt_ids(p.messages)) for p in prompts}
        done = self.base.generate([Request(tuple(context[p.id]), ("robustness", self.o.seed, "solve", p.id, i), self.o.sampling) for p, i in jobs])
        verdicts = self.score([(p, c.text if c else "") for (p, _), c in zip(jobs, done, strict=True)])
        tries: defaultdict[str, list[tuple[Completion, Verdict]]] = defaultdict(list)
        for (p, _), c, v in zip(jobs, done, verdicts, strict=True):
            if c is not None:
                tries[p.id].append((c, v))
        traces = [BaseTrace(p.id, context[p.id], c.token_ids, c.text) for p in prompts[: self.o.traces] for c, _ in tries[p.id][:1]]
        judged = [v.score for t in tries.values() for _, v in t if v.score is not None]
        solved = []
        for p in prompts:
            right = [c for c, v in tries[p.id] if v.score is not None and v.score >= 1]
            if len(right) < self.o.solve_min:
                self.left_out["recover"][f"the base solves it in fewer than {self.o.solve_min} of {self.o.solve_samples}"] += 1
                continue
            self.rng("trace", p.id).shuffle(right)
            cut = next(((c, ends) for c in right if (ends := self.ends(c.token_ids))), (right[0], []))
            if not cut[1]:
                self.left_out["recover"]["no correct trace with a step before the answer"] += 1
            solved.append(_Solved(p, context[p.id], self.bare(cut[0].token_ids), cut[1]))
        return solved, traces, float(np.mean(judged)) if judged else None

    # ------------------------------------------------ recoverability A: local corruption

    def sites(self, solved: Sequence[_Solved]) -> Iterator[_Site]:
        """The step at each relative position r; a step is taken once, at the smallest r that falls into it."""
        for s in solved:
            taken: set[int] = set()
            for r in self.o.r if s.ends else ():
                k = next((k for k, end in enumerate(s.ends) if end > r * len(s.ids)), None)
                if k is None or k in taken:
                    self.left_out[f"recover/r={r:g}"]["behind the last step" if k is None else "the same step as at a smaller r"] += 1
                    continue
                taken.add(k)
                yield _Site(s, r, k)

    def parts(self, site: _Site) -> tuple[list[int], str]:
        """(ids of the prefix, text of the step)."""
        s = site.solved
        start = s.start(site.k)
        return s.ids[:start], self.text(s.ids[: s.ends[site.k]])[len(self.text(s.ids[:start])) :]

    def candidates(self, sites: list[_Site]) -> list[_Candidate]:
        made: list[_Candidate] = []

        def add(site: _Site, source: str, words: str) -> None:
            prefix, step = self.parts(site)
            lead, _, tail = split_dress(step, self.o.cut)
            text = lead + words + tail
            made.append(_Candidate(site, source, text, self.base.join(prefix, text)))

        for name, pollute in self.polluters.items():
            asked = [(s.solved.prompt, self.text(self.parts(s)[0]), self.parts(s)[1]) for s in sites]
            for site, replies in zip(sites, pollute(asked) if asked else [], strict=True):
                for reply in replies:
                    self.shares[name]["made"] += 1
                    if reply is None:
                        self.left_out[f"recover/{name}"]["gate: not between the delimiters, or not expressible"] += 1
                    else:
                        add(site, name, split_dress(reply, self.o.cut)[1])
        for site in sites:
            words = split_dress(self.parts(site)[1], self.o.cut)[1]
            for name, edit in RULES.items():
                new = edit(words, self.rng("rule", name, site.solved.prompt.id, site.r))
                if new is None:
                    self.left_out[f"recover/{name}"]["the rule does not apply to the step"] += 1
                else:
                    self.shares[name]["made"] += 1
                    add(site, name, new)
        return made

    def gated(self, made: list[_Candidate]) -> list[_Candidate]:
        """Those that pass; the coherence limit holds for polluters (a rule's edit is as long and as close as its original by construction)."""
        passed: list[_Candidate] = []
        seen: set[tuple[Any, ...]] = set()
        for c in made:
            prefix, step = self.parts(c.site)
            key = (c.site.solved.prompt.id, c.site.r, c.source, c.text)
            original = c.site.solved.ids[len(prefix) : c.site.solved.ends[c.site.k]]
            why = "a repeat" if key in seen else self.o.gate.refuses(original, self.base.encode(c.text), step, c.text, edits=c.source in self.polluters)
            seen.add(key)
            if why or (why := self.base.cannot([], c.text)):
                self.left_out[f"recover/{c.source}"][f"gate: {why}"] += 1
            else:
                passed.append(c)
        sites = {(id(c.site)): c.site for c in passed}
        pairs = [([*s.solved.context, *self.parts(s)[0]], s.solved.ids[s.solved.start(s.k) : s.solved.ends[s.k]]) for s in sites.values()]
        own = [float(-np.mean(row)) for row in self.base.engine.score(pairs)] if pairs else []
        self.tau = float(np.percentile(own, 99)) + self.o.coherence_nats if own else None
        behind = [len(self.parts(c.site)[0]) for c in passed]
        rows = self.base.engine.score([([*c.site.solved.context, *c.ids[:n]], c.ids[n:]) for c, n in zip(passed, behind, strict=True)]) if passed else []
        kept = []
        for c, row in zip(passed, rows, strict=True):
            c.nll = float(-np.mean(row))
            if c.source in self.polluters and self.tau is not None and c.nll > self.tau:
                self.left_out[f"recover/{c.source}"]["gate: incoherent"] += 1
                continue
            self.shares[c.source]["passed the gate"] += 1
            kept.append(c)
        return kept

    def continue_greedily(self, passed: list[_Candidate]) -> None:
        """The proxy for "truly wrong": a greedy continuation of the base ends in a wrong answer. It selects effective attacks."""
        how = replace(self.o.sampling, temperature=0.0)
        done = self.base.generate([Request((*c.site.solved.context, *c.ids), ("robustness", self.o.seed, "greedy", i), how) for i, c in enumerate(passed)])
        verdicts = self.score([(c.site.solved.prompt, d.text if d else "") for c, d in zip(passed, done, strict=True)])
        for c, d, v in zip(passed, done, verdicts, strict=True):
            c.continued, c.effective = d, d is not None and v.score is not None and v.score < 1

    def recover(self, passed: list[_Candidate]) -> list[_Candidate]:
        """Items and their controls: of each source the first corruption of a site that holds."""
        kept: dict[tuple[str, float, str], _Candidate] = {}
        controls: dict[tuple[str, float], _Site] = {}
        for c in passed:
            if c.effective:
                self.shares[c.source]["effective"] += 1
            elif self.o.proxy:
                self.left_out[f"recover/{c.source}"]["the base's greedy continuation is still right"] += 1
                continue
            key = (c.site.solved.prompt.id, c.site.r, c.source)
            if key not in kept:
                kept[key] = c
                controls[key[:2]] = c.site
        for (problem, r, source), c in kept.items():
            prefix, step = self.parts(c.site)
            meta = {"step": c.site.k, "original": step, "corruption": c.text, "nll_nats": c.nll, "effective": c.effective}
            meta["start"] = len(prefix) / len(c.site.solved.ids)
            s = c.site.solved
            self.add("recover", problem, s.prompt.messages, self.text(c.ids), [*s.context, *c.ids], source=source, at=r, meta=meta)
            self.shares[source]["items"] += 1
        for (problem, r), site in controls.items():
            ids = site.solved.ids[: site.solved.ends[site.k]]
            self.add("control", problem, site.solved.prompt.messages, self.text(ids), [*site.solved.context, *ids], at=r, meta={"step": site.k})
        return list(kept.values())

    # ------------------------------------------------ recoverability B: off-trajectory distraction

    def distract(self, solved: list[_Solved]) -> None:
        """[first m of the own trace, cut back to a step's end; first 20 % of the trace of another problem]. Source: arXiv:2510.06410."""
        if len(solved) < 2:
            self.left_out["distract"]["fewer than two solved problems"] += len(solved)
            return
        for s in solved:
            rng = self.rng("distract", s.prompt.id)
            other = pick(rng, [o for o in solved if o is not s])
            steer = other.ids[: max(1, round(self.o.steer * len(other.ids)))]
            seen: set[int] = set()
            for m in self.o.m:
                end = cut_back(s.ids, int(m * len(s.ids)), self.base.chat.text, self.o.cut) if m else 0
                if end in seen:
                    self.left_out[f"distract/m={m:g}"]["cut back to where a smaller m was"] += 1
                    continue
                seen.add(end)
                ids = [*s.ids[:end], *steer]
                meta = {"from": other.prompt.id, "kept": end / len(s.ids)}
                self.add("distract", s.prompt.id, s.prompt.messages, self.text(ids), [*s.context, *ids], at=m, meta=meta)

    # ------------------------------------------------ diagnosability

    def diagnose_own(self, kept: list[_Candidate], solved: list[_Solved]) -> None:
        """Corrupted solutions carried on by the base, in turn over the position of the error; as many clean ones, first of the same problems."""
        by_step: defaultdict[int, list[_Candidate]] = defaultdict(list)
        for c in sorted(kept, key=lambda c: self.rng("diagnose", c.site.solved.prompt.id, c.site.r, c.source).random()):
            if c.continued is not None and c.effective:
                by_step[c.site.k].append(c)
        chosen: list[_Candidate] = []
        while any(by_step.values()) and len(chosen) < self.o.diagnose:
            chosen += [row.pop() for _, row in sorted(by_step.items()) if row][: self.o.diagnose - len(chosen)]
        made = 0
        for n, c in enumerate(chosen):
            s, rest = c.site.solved, self.bare(c.continued.token_ids if c.continued else [])
            prefix = self.pieces(s.ids[: s.start(c.site.k)], [e for e in s.ends if e < s.start(c.site.k)])
            steps = [*prefix, c.text.strip(), *self.pieces(rest, self.ends(rest))]
            made += self.ask(s.prompt, steps, len(prefix), f"own/{n}", "own")
        problems = {c.site.solved.prompt.id for c in chosen}
        for s in sorted((s for s in solved if s.ends), key=lambda s: s.prompt.id not in problems)[:made]:
            self.ask(s.prompt, self.pieces(s.ids, s.ends), -1, "own/clean", "own")
