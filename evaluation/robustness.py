"""Runs a frozen robustness set on a model and turns the answers into figures. What each figure means: docs/robustness.md."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from llmrl.evaluation.robustness_set import Item, Subject, Suite
from llmrl.evaluation.robustness_stats import Measured, Resampled
from llmrl.records import Completion, InputError, Prompt, Request, Verdict
from llmrl.rewards.extract import boxed, plain

Score = Callable[[list[tuple[Prompt, str]]], list[Verdict]]
GROUPS = (("clean", "perturb"), ("recover", "control", "distract"), ("diagnose",))
"""Phases that are generated in one call: contexts of like length."""
EARLY_TOKENS = 100
"""The behavioural variant looks at this much of a continuation."""
CORRECTION = re.compile(
    r"\b(?:wait|actually|hold on|let me (?:re)?check|let me (?:redo|recompute|recalculate)|mistake\w*|incorrect\w*|not (?:right|correct)|that(?:'s| is) wrong"
    r"|(?:is|was) wrong|correct(?:ion|ed|ing)|error|oops|instead of|should (?:be|have been))\b",
    re.I,
)
"""Words of an explicit correction. A list, no judge: it misses corrections in other words, and counts these words in other uses."""


@dataclass(frozen=True)
class Answer:
    """One continuation or response, judged on its own text alone."""

    item: str
    sample: int
    score: float | None
    """None: could not be judged."""
    status: str
    answer: str | None
    tokens: int
    finish: str
    text: str
    early: str = ""
    """Its first EARLY_TOKENS tokens."""


@dataclass(frozen=True)
class Sheet:
    """What one model answered to a set."""

    model: str
    same_tokenizer: bool
    answers: dict[str, list[Answer]]
    """By item; an item that could not be put to the model is not here."""
    left_out: dict[str, dict[str, int]]
    """phase -> reason -> items."""


def ask(subject: Subject, suite: Suite, score: Score, *, seed: int = 0, each: Callable[[int], None] = lambda done: None) -> Sheet:
    """Every item `samples` times (diagnosis once, greedily), each group of phases in one engine call; `each` is told the items done.

    The random stream belongs to (seed, item, sample): the same for every model. A model with the base's tokenizer gets the frozen ids; any
    other gets the frozen text through its own tokenizer and chat template, and items that these cannot express are left out and counted.
    """
    same = subject.digest == suite.header["tokenizer"]
    left_out: defaultdict[str, Counter[str]] = defaultdict(Counter)
    answers: dict[str, list[Answer]] = {}
    greedy, done_items = replace(suite.sampling, temperature=0.0, top_p=1.0), 0
    for phases in GROUPS:
        jobs: list[tuple[Item, int, Request]] = []
        for item in (i for i in suite.items if i.phase in phases):
            if not same and (why := subject.cannot(item.messages, item.prefix)) is not None:
                left_out[item.phase][why] += 1
                continue
            context = item.context_ids if same else [*subject.chat.prompt_ids(item.messages), *subject.encode(item.prefix)]
            how = greedy if item.phase == "diagnose" else suite.sampling
            times = 1 if item.phase == "diagnose" else suite.header["samples"]
            jobs += [(item, i, Request(tuple(context), ("robustness", seed, item.id, i), how)) for i in range(times)]
        completions = subject.generate([r for _, _, r in jobs])
        done = [(item, i, c) for (item, i, _), c in zip(jobs, completions, strict=True) if c is not None]
        for (item, i, _), c in zip(jobs, completions, strict=True):
            if c is None and i == 0:
                left_out[item.phase]["context and answer exceed the model's positions"] += 1
        verdicts = _diagnoses(done, suite) if phases == ("diagnose",) else score([(suite.problems[item.problem], c.text) for item, _, c in done])
        for (item, i, c), v in zip(done, verdicts, strict=True):
            early = subject.chat.text(c.token_ids[:EARLY_TOKENS]) if item.phase == "recover" else ""
            answers.setdefault(item.id, []).append(Answer(item.id, i, v.score, v.status, v.answer, len(c.token_ids), c.finish, c.text, early))
        done_items += sum(i.phase in phases for i in suite.items)
        each(done_items)
    return Sheet(subject.name, same, answers, {k: dict(v) for k, v in sorted(left_out.items())})


def _diagnoses(done: Sequence[tuple[Item, int, Completion]], suite: Suite) -> list[Verdict]:
    mark = suite.header["options"]["cut"]["answer_mark"]
    verdicts = []
    for item, _, c in done:
        said = read_index(c.text, mark)
        if said is None:
            verdicts.append(Verdict(0.0, "no_answer"))
        else:
            verdicts.append(Verdict(float(said == item.meta["label"]), "ok", str(said)))
    return verdicts


def read_index(text: str, answer_mark: str | None = None) -> int | None:
    r"""The whole number in the last \boxed{}; where nothing is boxed and the task has an answer mark, the number behind its last one."""
    boxes = boxed(text)
    inner = boxes[-1] if boxes else text.rpartition(answer_mark)[2] if answer_mark and answer_mark in text else ""
    found = re.fullmatch(r"\D*?(-?\d+)\D*", inner.replace("−", "-"))  # noqa: RUF001  # the minus sign that models write
    return int(found[1]) if found else None


# ---------------------------------------------------------------- figures


def figures(suite: Suite, sheets: Sequence[Sheet], *, resamples: int = 2000, seed: int = 0) -> list[dict[str, Measured]]:
    """For each model its figures by name, all from the same resampled problems, so that any two can be subtracted.

    Raises InputError for two models of one name, or none.
    """
    if not sheets:
        raise InputError("no model to evaluate")
    problems = Resampled(sorted({i.problem for i in suite.items}), resamples=resamples, seed=seed)
    solved = [_always_right(suite, sheet) for sheet in sheets]
    shared = set.intersection(*solved)
    return [_Figures(suite, sheet, problems).all(own, shared) for sheet, own in zip(sheets, solved, strict=True)]


def _always_right(suite: Suite, sheet: Sheet) -> set[str]:
    """Problems of which every clean sample is right."""
    right = {i.problem: [a.score for a in sheet.answers.get(i.id, [])] for i in suite.items if i.phase == "clean"}
    return {p for p, scores in right.items() if scores and all(s is not None and s >= 1 for s in scores)}


class _Figures:
    def __init__(self, suite: Suite, sheet: Sheet, problems: Resampled):
        self.suite, self.sheet, self.problems = suite, sheet, problems
        self.found: dict[str, Measured] = {}
        self.by_phase: defaultdict[str, list[Item]] = defaultdict(list)
        for item in suite.items:
            if item.id in sheet.answers:
                self.by_phase[item.phase].append(item)

    def all(self, own: set[str], shared: set[str]) -> dict[str, Measured]:
        clean = {i.problem: self.scores(i) for i in self.by_phase["clean"]}
        self.found["clean/accuracy"] = self.problems.mean(clean)
        for phase in ("clean", "recover", "control"):
            lengths = {i.id: (i.problem, [a.tokens for a in self.sheet.answers[i.id]]) for i in self.by_phase[phase]}
            if lengths:
                self.found[f"{phase}/tokens"] = self.problems.mean(self.grouped(lengths.values()))
                silent = ((i.problem, [a.status == "no_answer" for a in self.sheet.answers[i.id]]) for i in self.by_phase[phase])
                self.found[f"{phase}/no_answer"] = self.problems.mean(self.grouped(silent))
        self.recover()
        self.behaviour()
        self.distract({"all": set(self.suite.problems), "individual": own, "shared": shared})
        self.diagnose()
        self.perturb(clean)
        return self.found

    def scores(self, item: Item) -> list[float]:
        return [a.score for a in self.sheet.answers[item.id] if a.score is not None]

    @staticmethod
    def grouped(rows: Iterable[tuple[str, Sequence[float]]]) -> dict[str, list[float]]:
        out: defaultdict[str, list[float]] = defaultdict(list)
        for problem, values in rows:
            out[problem] += values
        return out

    def recover(self) -> None:
        """Rec and Rec0 at the same (problem, r), by source and r; "rules" are number, sign and swap together, "any" all r together."""
        control = {(i.problem, i.at): self.scores(i) for i in self.by_phase["control"]}
        rows: defaultdict[tuple[str, str], list[Item]] = defaultdict(list)
        for item in self.by_phase["recover"]:
            for source in (item.source, "rules") if item.source in ("number", "sign", "swap") else (item.source,):
                for at in (f"r={item.at:g}", "any"):
                    rows[source, at].append(item)
        for (source, at), items in sorted(rows.items()):
            rec = self.problems.mean(self.grouped((i.problem, self.scores(i)) for i in items))
            sites = dict.fromkeys((i.problem, i.at) for i in items)
            rec0 = self.problems.mean(self.grouped((site[0], control[site]) for site in sites if site in control))
            name = f"recover/{source}/{at}"
            self.found |= {f"{name}/rec": rec, f"{name}/rec0": rec0, f"{name}/drop": rec0 - rec, f"{name}/normalised": rec / rec0}

    def behaviour(self) -> None:
        """Of recoveries that end rightly: a correction in words, the step redone without a word, or neither."""
        marks = self.suite.header["options"]["corrections"]
        kinds: dict[str, list[tuple[str, list[float]]]] = {"explicit": [], "redone": [], "silent": []}
        for item in self.by_phase["recover"]:
            step = "".join(item.meta["original"].split())
            for a in self.sheet.answers[item.id]:
                if a.score is not None and a.score >= 1:
                    explicit = CORRECTION.search(a.early) is not None or any(mark in a.early for mark in marks)
                    redone = not explicit and step != "" and step in "".join(a.early.split())
                    for kind, is_it in (("explicit", explicit), ("redone", redone), ("silent", not explicit and not redone)):
                        kinds[kind].append((item.problem, [float(is_it)]))
        for kind, rows in kinds.items():
            if rows:
                self.found[f"recover/behaviour/{kind}"] = self.problems.share(self.grouped(rows))

    def distract(self, subsets: dict[str, set[str]]) -> None:
        """all: what the base solved when the set was built; individual: solved in every clean sample by this model; shared: by every model."""
        for subset, members in subsets.items():
            rows: defaultdict[str, list[Item]] = defaultdict(list)
            for item in self.by_phase["distract"]:
                if item.problem in members:
                    rows[f"m={item.at:g}"].append(item)
                    rows["any"].append(item)
            for at, items in sorted(rows.items()):
                self.found[f"distract/{subset}/{at}/accuracy"] = self.problems.mean(self.grouped((i.problem, self.scores(i)) for i in items))

    def diagnose(self) -> None:
        """ProcessBench's convention (arXiv:2412.06559): accuracy on wrong and on right solutions, and their harmonic mean."""
        for source in sorted({i.source for i in self.by_phase["diagnose"]}):
            items = [i for i in self.by_phase["diagnose"] if i.source == source]
            wrong, right = [i for i in items if i.meta["label"] >= 0], [i for i in items if i.meta["label"] < 0]

            def share(items: list[Item], of: Callable[[Item], float]) -> Measured:
                return self.problems.share(self.grouped((i.problem, [of(i)]) for i in items))

            err, ok = share(wrong, self.exact), share(right, self.exact)
            near = share(wrong, lambda i: float((said := self.said(i)) is not None and said >= 0 and abs(said - i.meta["label"]) <= 1))
            name = f"diagnose/{source}"
            self.found |= {
                f"{name}/acc_err": err, f"{name}/acc_ok": ok, f"{name}/f1": err.harmonic(ok), f"{name}/within_one": near,
                f"{name}/guess_longest": share(wrong, lambda i: float(i.meta["longest"] == i.meta["label"])),
                f"{name}/chance": share(items, lambda i: 1 / (i.meta["steps"] + 1)),
                f"{name}/no_answer": share(items, lambda i: float(self.said(i) is None)),
            }  # fmt: skip

    def exact(self, item: Item) -> float:
        return float(np.mean(self.scores(item)))

    def said(self, item: Item) -> int | None:
        answer = self.sheet.answers[item.id][0].answer
        return None if answer is None else int(answer)

    def perturb(self, clean: dict[str, list[float]]) -> None:
        """By kind: accuracy, accuracy on the same problems unperturbed, their difference, and how often both give the same answer."""
        plain_of = {i.problem: self.sheet.answers[i.id] for i in self.by_phase["clean"]}
        for kind in sorted({i.source for i in self.by_phase["perturb"]}):
            items = [i for i in self.by_phase["perturb"] if i.source == kind and i.problem in clean]
            changed = self.problems.mean({i.problem: self.scores(i) for i in items})
            before = self.problems.mean({i.problem: clean[i.problem] for i in items})
            pairs = ((i.problem, agree(plain_of[i.problem], self.sheet.answers[i.id])) for i in items)
            same = self.problems.mean({p: [float(a)] for p, a in pairs if a is not None})
            name = f"perturb/{kind}"
            self.found |= {f"{name}/accuracy": changed, f"{name}/clean": before, f"{name}/drop": before - changed, f"{name}/consistency": same}


def agree(a: Sequence[Answer], b: Sequence[Answer]) -> bool | None:
    """Whether the most frequent answers of both are the same (as text without dressing, or both right). None: one side has no answer."""
    first, second = _vote(a), _vote(b)
    if first is None or second is None:
        return None
    return first[0] == second[0] or (first[1] and second[1])


def _vote(answers: Sequence[Answer]) -> tuple[str, bool] | None:
    """(most frequent answer, whether it is right); of equally frequent ones the first."""
    votes = [(plain(a.answer), a.score is not None and a.score >= 1) for a in answers if a.answer is not None and a.status != "no_answer"]
    if not votes:
        return None
    best, _ = Counter(text for text, _ in votes).most_common(1)[0]
    return best, any(right for text, right in votes if text == best)


def empty_kinds(suite: Suite) -> list[str]:
    """What the set's options ask for and no item is of: named in every report, with the reasons in the header's left_out."""
    o = suite.header["options"]
    there = {(i.phase, i.source, i.at) for i in suite.items}
    phases = {phase for phase, _, _ in there}
    missing = [f"{p} (none at all)" for p in ("clean", "recover", "control", "distract", "diagnose", "perturb") if p not in phases]
    missing += [f"perturb/{k}" for k in o["kinds"] if "perturb" in phases and not any(p == "perturb" and s == k for p, s, _ in there)]
    for phase, letter, values in (("recover", "r", o["r"]), ("distract", "m", o["m"])):
        missing += [f"{phase}/{letter}={v:g}" for v in values if phase in phases and not any(p == phase and at == v for p, _, at in there)]
    missing += [f"recover/{s}" for s in suite.header["sources"] if "recover" in phases and not any(p == "recover" and x == s for p, x, _ in there)]
    return missing


def answers_json(sheet: Sheet) -> Iterable[dict[str, Any]]:
    """Every answer, for reading by eye and for other statistics."""
    for rows in sheet.answers.values():
        yield from ({k: v for k, v in asdict(a).items() if k != "early"} for a in rows)
