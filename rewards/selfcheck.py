"""The contract of a verifier, proven on the verifier itself in real worker processes: what `llmrl check REF` reports."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrl import plugins
from llmrl.records import InputError, Prompt, Verdict
from llmrl.scoring import Scorer

_HOSTILE = {
    "100 kB of one digit": "1" * 100_000,
    "50,000 open brackets": "(" * 50_000,
    "2,000 nested boxes": r"\boxed{" * 2000 + "1" + "}" * 2000,
    "a power tower": r"\boxed{9^{9^{9^{9}}}}",
    "null bytes": "\0" * 1000 + "The answer is \0.",
    "half a surrogate pair": "\ud83d answer: \ud83d",
}


@dataclass(frozen=True)
class CheckRow:
    """One line of the report."""

    name: str
    ok: bool
    detail: str


def gold_forms(gold: str, kwargs: dict[str, Any]) -> dict[str, str]:
    r"""name -> a response that does nothing but give the gold answer, in the forms that verifiers ask for."""
    forms = {"as it is": gold, "boxed": f"\\boxed{{{gold}}}", "phrase": f"The answer is {gold}", "hash": f"#### {gold}"}
    markers = [part.get("after") for part in (kwargs, *kwargs.get("parts", []))]
    return forms | {f"after {marker}": f"{marker}{gold}" for marker in markers if isinstance(marker, str)}


def check_verifier(ref: str, kwargs: dict[str, Any], base: Path, *, timeout_s: float = 10.0) -> list[CheckRow]:
    """Checks the contract of DESIGN section 5; a row per promise, and one per self-check row that fails. Never raises for a bad verifier.

    A self-check row is (question, gold, response, expected score) and holds for the factory's defaults, or for `kwargs` where the
    factory has keywords without a default; a fifth element, a dict of keywords, says for which keywords it holds instead. A sixth,
    a dict, holds the row's other columns (Prompt.meta). Where a factory cannot have rows (a reward model's scores are no fixed numbers),
    its attribute `no_selfcheck` says why; where it may refuse long responses as error, its attribute `refuses_long` does.
    """
    try:
        factory = plugins.resolve(ref, home="llmrl.rewards", base=base)
        inner = getattr(factory, "func", factory)
        cases = _cases(factory, kwargs)
        if not kwargs and cases and all(case[4] for case in cases):
            kwargs = cases[0][4]  # it cannot be built without keywords: `llmrl check format`
        started = time.monotonic()
        with Scorer(ref, kwargs, base, workers=1, timeout_s=timeout_s, max_failure_rate=1.0) as scorer:
            rows = [CheckRow("builds in a fresh process", True, f"in {time.monotonic() - started:.2f} s")]
            own = [case for case in cases if case[4] == kwargs]
            prompt = _items(own or cases)[0][0] if cases else _prompt(0, "2+2", "4", {})
            rows += [_deterministic(scorer, cases), _survives(scorer, prompt, getattr(inner, "refuses_long", "")), _deadline(scorer, prompt, timeout_s)]
            rows += [_missing_gold(scorer, own)] if own else []
    except InputError as error:
        return [CheckRow("builds in a fresh process", False, str(error))]
    if not cases:
        if hasattr(inner, "no_selfcheck"):
            return [*rows, CheckRow("self-check rows pass", True, f"there are none: {inner.no_selfcheck}")]
        mend = 'give the factory rows: NAME.selfcheck = [("question", "gold", "response", expected score), ...]'
        return [*rows, CheckRow("self-check rows pass", ref.startswith("trl:"), f"there are none; {mend}")]
    return [*rows, *_selfcheck_rows(ref, base, cases, timeout_s)]


_Case = tuple[str, "str | None", str, float, dict[str, Any], dict[str, Any]]


def _cases(factory: Callable[..., Any], kwargs: dict[str, Any]) -> list[_Case]:
    inner = getattr(factory, "func", factory)
    needs_keys = any(
        p.default is p.empty and p.kind is not p.VAR_KEYWORD and p.name != "base" for p in inspect.signature(factory).parameters.values()
    )
    found = []
    for row in getattr(inner, "selfcheck", []):
        if not isinstance(row, tuple | list) or not 4 <= len(row) <= 6 or not isinstance(row[2], str):
            raise InputError(f"selfcheck row {row!r}: expected (question, gold, response, expected score[, keywords[, other columns]])")
        keywords = {**(kwargs if needs_keys else {}), **(row[4] if len(row) > 4 else {})}
        found.append((*row[:4], keywords, dict(row[5]) if len(row) > 5 else {}))
    return found


def _items(cases: list[_Case]) -> list[tuple[Prompt, str]]:
    return [(_prompt(i, question, gold, meta), response) for i, (question, gold, response, _, _, meta) in enumerate(cases)]


def _prompt(i: int, question: str, gold: str | None, meta: dict[str, Any]) -> Prompt:
    return Prompt(f"selfcheck-{i}", ({"role": "user", "content": question},), gold, meta)


def _deterministic(scorer: Scorer, cases: list[_Case]) -> CheckRow:
    items = [*_items(cases), *((_prompt(0, "2+2", "4", {}), said) for said in (r"\boxed{4}", "five"))]
    runs = [[(v.score, v.status) for v in scorer.score(items)] for _ in range(3)]
    moved = [response for (_, response), *verdicts in zip(items, *runs, strict=True) if len(set(verdicts)) > 1]
    detail = f"the verdict changes for {moved[0][:200]!r}" if moved else f"{len(items)} responses three times"
    return CheckRow("deterministic", not moved, detail)


def _survives(scorer: Scorer, prompt: Prompt, refuses_long: str) -> CheckRow:
    texts = {"an empty response": "", "blanks": " \n\t ", "100 kB of words": "so we add the numbers " * 4600}
    verdicts = scorer.score([(prompt, text) for text in texts.values()])
    unjudged = {name: v for name, v in zip(texts, verdicts, strict=True) if v.score is None}
    if refuses_long and unjudged.get("100 kB of words", verdicts[0]).status == "error":
        unjudged.pop("100 kB of words", None)
    bad = [f"{name}: {v.status} {v.detail[:200]}" for name, v in unjudged.items()]
    detail = "; ".join(bad) or "scores " + ", ".join(f"none ({refuses_long})" if v.score is None else f"{v.score:g}" for v in verdicts)
    return CheckRow("empty and 100 kB responses are judged", not bad, detail)


def _deadline(scorer: Scorer, prompt: Prompt, timeout_s: float) -> CheckRow:
    slowest, unjudged = 0.0, []
    for name, text in _HOSTILE.items():
        started = time.monotonic()
        (verdict,) = scorer.score([(prompt, text)])
        slowest = max(slowest, time.monotonic() - started)
        unjudged += [f"{name}: {verdict.status}"] if verdict.score is None else []
    # seen from outside an item also waits for the worker that replaces a killed one
    held = slowest < timeout_s + 10
    detail = f"slowest of {len(_HOSTILE)} hostile responses {slowest:.2f} s; unjudged: {', '.join(unjudged) or 'none'}"
    return CheckRow("the deadline holds", held, detail)


def _missing_gold(scorer: Scorer, cases: list[_Case]) -> CheckRow:
    """Unjudged without a gold, or judged just as with it (then it is not needed)."""
    with_gold = scorer.score(_items(cases))
    without = scorer.score(_items([(case[0], None, *case[2:]) for case in cases]))
    silent = sum(b.score is not None and b.score != a.score for a, b in zip(with_gold, without, strict=True))
    mend = f'{silent} rows without a gold are graded; return Verdict(None, "error", detail="the row has no gold answer")'
    detail = mend if silent else f"{sum(v.score is None for v in without)} of {len(without)} unjudged"
    return CheckRow("a missing gold is no silent 0", not silent, detail)


def _selfcheck_rows(ref: str, base: Path, cases: list[_Case], timeout_s: float) -> list[CheckRow]:
    groups: list[tuple[dict[str, Any], list[_Case]]] = []
    for case in cases:
        same = next((group for keys, group in groups if keys == case[4]), None)
        if same is None:
            groups.append((case[4], [case]))
        else:
            same.append(case)
    failed: list[CheckRow] = []
    golds: list[str] = []
    for keys, group in groups:
        try:
            with Scorer(ref, keys, base, workers=1, timeout_s=timeout_s, max_failure_rate=1.0) as scorer:
                failed += [_wrong(case, v) for case, v in zip(group, scorer.score(_items(group)), strict=True) if v.score != case[3]]
                golds += _refused_golds(scorer, keys, group)
        except InputError as error:
            failed.append(CheckRow(f"self-check rows for {keys}", False, str(error)))
    detail = f"not in any usual form: {', '.join(map(repr, golds[:3]))}" if golds else "each in a usual form"
    passed = CheckRow("self-check rows pass", not failed, f"{len(cases) - len(failed)} of {len(cases)}")
    return [CheckRow("gold answers score 1", not golds, detail), passed, *failed]


def _wrong(case: _Case, verdict: Verdict) -> CheckRow:
    question, gold, response, expected, keys, _ = case
    name = f"self-check row {question[:60]!r}, gold {gold!r}, response {response[:80]!r}" + (f", {keys}" if keys else "")
    return CheckRow(name, False, f"expected {expected}, got {verdict.score} ({verdict.status}) {verdict.detail[:200]}")


def _refused_golds(scorer: Scorer, keys: dict[str, Any], cases: list[_Case]) -> list[str]:
    """Golds of rows that can score 1 which do so in none of gold_forms."""
    refused = []
    for question, gold, _, expected, _, meta in cases:
        if expected == 1.0 and gold:
            prompt = _prompt(0, question, gold, meta)
            verdicts = scorer.score([(prompt, text) for text in gold_forms(gold, keys).values()])
            refused += [] if any(v.score == 1.0 for v in verdicts) else [gold]
    return refused
