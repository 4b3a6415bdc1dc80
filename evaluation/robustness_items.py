"""What every part of a robustness set needs while it is built, and its parts that ask by prompts: diagnosis and perturbed problems."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from llmrl.evaluation.corruptions import Cut, Gate, pick, step_ends
from llmrl.evaluation.perturb import KINDS, Material, Perturbed, perturb
from llmrl.evaluation.robustness_set import Item, Subject
from llmrl.records import Message, Prompt, Sampling, Verdict

Score = Callable[[list[tuple[Prompt, str]]], list[Verdict]]
Diagnose = Callable[[Prompt, str], Sequence[Message]]
"""(prompt, numbered steps) -> the messages that ask for the first wrong step."""

EVALUATION = Sampling(max_new_tokens=512, temperature=0.6, top_p=0.95)


@dataclass(frozen=True)
class Options:
    """How a set is made; goes into its header as it is."""

    sampling: Sampling = EVALUATION
    """Of every evaluation on the set; 0.6 / 0.95 is our choice."""
    samples: int = 8
    """Continuations of a context, responses to a prompt."""
    solve_samples: int = 8
    solve_min: int = 7
    """Recoverability takes problems that the base solves in at least solve_min of solve_samples."""
    r: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7)
    m: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8)
    steer: float = 0.2
    cut: Cut = field(default_factory=Cut)
    gate: Gate = field(default_factory=Gate)
    coherence_nats: float = 1.0
    """A polluter's step may have this much more mean NLL a token than the 99th percentile of the original steps."""
    proxy: bool = True
    """Keep only corruptions after which the base's greedy continuation has a wrong answer."""
    kinds: tuple[str, ...] = KINDS
    corrections: tuple[str, ...] = ()
    """Texts that are an explicit correction in the task's own language, besides English words, e.g. "~"."""
    diagnose: int = 100
    """Corrupted, and as many clean, solutions for diagnosis; likewise the ProcessBench rows of each part."""
    traces: int = 256
    seed: int = 0


def raw_problem(prompt: Prompt) -> str:
    """The problem without what a template put around it: the row's own column where the user message holds it, else the whole message."""
    columns = (prompt.meta.get(k) for k in ("prompt", "question", "problem"))
    return next((v for v in columns if isinstance(v, str) and v and v in prompt.text), prompt.text)


def with_text(prompt: Prompt, content: str) -> list[Message]:
    """The prompt's messages with another last user message."""
    users = [i for i, m in enumerate(prompt.messages) if m["role"] == "user"]
    return [{**m, "content": content} if i == users[-1] else dict(m) for i, m in enumerate(prompt.messages)]


class Collector:
    """Items, and what was left out and why."""

    def __init__(self, base: Subject, score: Score, options: Options, diagnose: Diagnose):
        self.base, self.score, self.o, self.ask_diagnosis = base, score, options, diagnose
        self.left_out: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.items: list[Item] = []

    def rng(self, *key: object) -> random.Random:
        return random.Random("/".join(map(str, ("robustness", self.o.seed, *key))))

    def add(self, phase: str, problem: str, messages: Sequence[Message], prefix: str = "", context: Sequence[int] | None = None, **rest: Any) -> bool:
        """False where the base's tokenizer cannot express it: counted."""
        source, at = rest.get("source", ""), rest.get("at")
        if (why := self.base.cannot(messages, prefix)) is not None:
            self.left_out[f"{phase}/{source}" if source else phase][why] += 1
            return False
        ids = list(context) if context is not None else self.base.chat.prompt_ids(messages)
        name = "/".join(str(part) for part in (phase, problem, source, at) if part not in ("", None))
        self.items.append(Item(name, phase, problem, [dict(m) for m in messages], prefix, ids, source, at, rest.get("meta", {})))
        return True

    def ends(self, ids: Sequence[int]) -> list[int]:
        return step_ends(self.bare(ids), self.base.chat.text, self.o.cut)

    def bare(self, ids: Sequence[int]) -> list[int]:
        """Without the end token."""
        special = set(self.base.chat.tokenizer.all_special_ids)
        n = len(ids)
        while n and ids[n - 1] in special:
            n -= 1
        return list(ids[:n])

    def text(self, ids: Sequence[int]) -> str:
        return self.base.chat.text(ids)

    def pieces(self, ids: Sequence[int], ends: Sequence[int]) -> list[str]:
        """The texts of the steps, the rest with the answer as the last one."""
        texts = [self.text(ids[: max(e, 0)]) for e in (0, *ends, len(ids))]
        return [b[len(a) :].strip() for a, b in pairwise(texts) if b[len(a) :].strip()]

    def ask(self, prompt: Prompt, steps: Sequence[str], label: int, name: str, source: str) -> bool:
        numbered = "\n\n".join(f"[{i}] {step}" for i, step in enumerate(steps))
        meta = {"label": label, "steps": len(steps), "longest": max(range(len(steps)), key=lambda i: len(steps[i])), "name": name}
        before = len(self.items)
        bare = replace(prompt, messages=tuple(with_text(prompt, raw_problem(prompt))))  # not how the answer is to be written
        if not self.add("diagnose", prompt.id, list(self.ask_diagnosis(bare, numbered)), source=source, meta=meta):
            return False
        self.items[before] = replace(self.items[before], id=f"diagnose/{prompt.id}/{name}")
        return True

    def diagnose_rows(self, rows: Sequence[dict[str, Any]]) -> list[Prompt]:
        """ProcessBench rows, of each part at most `diagnose` with an error and as many without: chosen by seed, then asked like our own."""
        parts: defaultdict[tuple[str, bool], list[dict[str, Any]]] = defaultdict(list)
        for row in rows:
            if row.get("first_error_step") is None or not row.get("steps"):
                self.left_out["diagnose/processbench"]["no step label"] += 1
            else:
                parts[(str(row.get("source", "processbench")).lower(), row["first_error_step"] >= 0)].append(row)
        prompts = []
        for (source, _), members in sorted(parts.items()):
            members.sort(key=lambda row: self.rng("processbench", row["id"]).random())
            for row in members[: self.o.diagnose]:
                prompt = Prompt(str(row["id"]), ({"role": "user", "content": row["problem"]},))
                if self.ask(prompt, row["steps"], row["first_error_step"], source, source):
                    prompts.append(prompt)
        return prompts

    def perturbed(self, prompts: Sequence[Prompt], steps: dict[str, str]) -> None:
        """steps: a wrong beginning of a solution, by problem."""
        wrong = self.wrong_answers(prompts) if "misleading" in self.o.kinds else {}
        for p in prompts:
            raw = raw_problem(p)
            material = Material(wrong.get(p.id), steps.get(p.id), self.o.cut.sep, self.o.cut.answer_mark)
            for kind in self.o.kinds:
                new = perturb(kind, raw, self.rng("perturb", kind, p.id), material)
                if not isinstance(new, Perturbed):
                    self.left_out[f"perturb/{kind}"][new] += 1
                    continue
                self.add("perturb", p.id, with_text(p, p.text.replace(raw, new.text, 1)), source=kind, meta={"variant": new.variant})

    def wrong_answers(self, prompts: Sequence[Prompt]) -> dict[str, str]:
        """An answer near the gold (numbers), or another problem's, that the verifier rejects."""
        asked: list[tuple[Prompt, str]] = []
        golds = [p.answer for p in prompts if p.answer]
        for p in prompts:
            rng = self.rng("wrong", p.id)
            try:
                near = [str(int(p.answer or "") + d) for d in (pick(rng, (-2, -1, 1, 2)), pick(rng, (-10, 10)))]
            except ValueError:
                near = [pick(rng, golds) for _ in range(3)] if golds else []
            asked += [(p, b) for b in near if b != p.answer]
        mark = self.o.cut.answer_mark
        verdicts = self.score([(p, f"{mark}{b}" if mark else f"\\boxed{{{b}}}") for p, b in asked])
        found: dict[str, str] = {}
        for (p, b), v in zip(asked, verdicts, strict=True):
            if v.score == 0 and v.status == "ok":
                found.setdefault(p.id, b)
        return found
