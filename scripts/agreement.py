r"""How well verifiers agree with labels: true- and false-positive rates by dataset, beside plain Math-Verify and plain string match.

    python scripts/agreement.py --data PATH [--every 1] [--json OUT] [--markdown OUT] [--wrong math_answer]

PATH holds math/ and traces/ (see the README there). Datasets:
- gsm8k_model_solutions, mr_gsm8k, qwen_math_cot: responses with a gold and a label of the final answer. Of mr_gsm8k and qwen_math_cot
  only rows with a gold, of mr_gsm8k no programs; the qwen labels are an upstream rule-based grader's.
- processbench/*: the gold comes from math/* by the problem's text (677 of 1617 rows); a model made the labels, and they are noisy.
- math_same: golds of MATH-500 and of every tenth row of the MATH training split, rewritten without changing their value (`same`).
- math_full_stop: the same golds with a full stop inside the box, as models write it; apart, since plain Math-Verify reads hardly any.
- math_other: the same golds changed in value (`other`).
Rates: tp = share of the positives that score 1, fp = share of the negatives that score 1, unjudged = share with status timeout or error.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.metadata
import json
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from llmrl.records import Prompt, Verdict, Verifier
from llmrl.scoring import Scorer

HERE = Path(__file__).resolve()
TIMEOUT_S = 5.0
MATH = ("gsm8k_train", "gsm8k_test", "math500", "math_train_levels", "aime24", "aime25", "amc23", "olympiadbench_oe_math_en")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_FRACTION = re.compile(r"(-?)\\frac\{(\d+)\}\{(\d+)\}")
_PAIR = re.compile(r"(\\left)?([(\[])([^,()\[\]]+),([^,()\[\]]+?)(\\right)?([)\]])")


class Case(NamedTuple):
    dataset: str
    gold: str
    response: str
    right: bool


def read(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def load(data: Path, every: int = 1) -> list[Case]:
    """All cases, or every `every`-th of each dataset, in a fixed order."""
    math = {name: read(next(p for p in sorted((data / "math").iterdir()) if p.name.split(".")[0] == name)) for name in MATH}
    golds = {row["prompt"].strip(): str(row["answer"]) for rows in math.values() for row in rows}
    found: dict[str, list[Case]] = {}
    for name in ("gsm8k_model_solutions", "mr_gsm8k", "qwen_math_cot", "processbench"):
        for row in read(data / "traces" / f"{name}.jsonl.gz"):
            gold = row.get("gold_answer") or golds.get(row["problem"].strip())
            dataset = row["source"].replace("ProcessBench", "processbench") if name == "processbench" else name
            if row["source"] != "MR-GSM8K/POT" and gold is not None and row["final_answer_correct"] is not None:
                response = row.get("response") or "\n".join(row["steps"])
                found.setdefault(dataset, []).append(Case(dataset, str(gold), response, bool(row["final_answer_correct"])))
    answers = [str(row["answer"]) for row in (*math["math500"], *math["math_train_levels"][::10])]
    frame = "Therefore the answer is $\\boxed{{{}}}$."
    found["math_same"] = [Case("math_same", g, r if "answer" in r else frame.format(r), True) for g in answers for r in same(g)]
    found["math_full_stop"] = [Case("math_full_stop", g, frame.format(f"{g}."), True) for g in answers]
    pairs = list(zip(answers, answers[1:] + answers[:1], strict=True))
    found["math_other"] = [Case("math_other", g, frame.format(r), False) for g, h in pairs for r in other(g, h)]
    return [case for cases in found.values() for case in cases[::every]]


def same(gold: str) -> Iterator[str]:
    r"""The gold in other notation, each equal to it by construction.

    \frac as \dfrac and as \tfrac; \left and \right dropped, or put at outer brackets; in a sentence between $; without blanks, and with
    blanks after commas and around + and -; a number: after "x = ", with a unit, with thousands separators; a
    fraction with denominator 2^a 5^b as its decimal; a list without brackets in reverse order; a percentage without its sign.
    """
    if r"\text" not in gold:
        yield f"The answer is ${gold}$."
    if r"\frac" in gold:
        yield gold.replace(r"\frac", r"\dfrac")
        yield gold.replace(r"\frac", r"\tfrac")
    if r"\left" in gold:
        yield re.sub(r"\\left|\\right", "", gold)
    elif re.fullmatch(r"\([^()]*\)", gold):
        yield rf"\left{gold[:-1]}\right)"
    if r"\text" not in gold and r"\begin" not in gold and not re.search(r"\\[A-Za-z]+ +[A-Za-z0-9]|\\ |\d +\d", gold):
        if " " in gold:
            yield gold.replace(" ", "")
        if re.search(r"[,+]", gold) and not re.search(r"\d,\d{3}|,\\!", gold):
            yield re.sub(r"\s*([,+])\s*", lambda m: ", " if m[1] == "," else " + ", gold)
    if _NUMBER.fullmatch(gold):
        yield f"x = {gold}"
        yield rf"{gold}\text{{ cm}}"
        if len(gold.lstrip("-")) > 3 and "." not in gold:
            yield f"{int(gold):,}"
    fraction = _FRACTION.fullmatch(gold)
    if fraction:
        value = Fraction(int(fraction[2]), int(fraction[3]))
        if 10**6 % value.denominator == 0 and value.denominator > 1:
            yield fraction[1] + f"{float(value):.6f}".rstrip("0")
    parts = [part.strip() for part in gold.split(",")]
    if len(parts) > 1 and all(re.fullmatch(r"-?\d+|-?\\frac\{\d+\}\{\d+\}", part) for part in parts) and not re.search(r"\d,\d{3}\b", gold):
        yield ", ".join(reversed(parts))
    if gold.endswith(r"\%"):
        yield gold[:-2]


def other(gold: str, neighbour: str) -> Iterator[str]:
    """The gold changed in value, each different from it by construction.

    Numbers and fractions: the sign flipped, one more, the fraction upside down, the next row's number where it is another one. Pairs:
    coordinates swapped, one outer bracket changed. Other LaTeX without index and words: its first digit one higher (9: one lower).
    """
    fraction = _FRACTION.fullmatch(gold)
    if _NUMBER.fullmatch(gold) or fraction:
        if re.search(r"[1-9]", gold):
            yield gold[1:] if gold.startswith("-") else f"-{gold}"
        if fraction and fraction[2] != fraction[3] and fraction[2] != "0":
            yield rf"{fraction[1]}\frac{{{fraction[3]}}}{{{fraction[2]}}}"
        if not fraction:
            yield str(Fraction(gold) + 1) if "." not in gold else f"{gold}7"
            if _NUMBER.fullmatch(neighbour) and Fraction(neighbour) != Fraction(gold):
                yield neighbour
        return
    pair = _PAIR.fullmatch(gold)
    if pair and pair[3].strip() != pair[4].strip():
        yield f"{pair[1] or ''}{pair[2]}{pair[4]},{pair[3]}{pair[5] or ''}{pair[6]}"
        if "infty" not in gold:
            yield f"{pair[1] or ''}{'[' if pair[2] == '(' else '('}{pair[3]},{pair[4]}{pair[5] or ''}{pair[6]}"
    digit = re.search(r"\d", gold)
    if digit and not re.search(r"_|\\text|\\begin", gold):
        yield gold[: digit.start()] + str(int(digit[0]) + 1 if digit[0] != "9" else 8) + gold[digit.end() :]


def math_verify() -> Verifier:
    """Math-Verify as its README shows it: parse both, verify. Without its own time limits: the worker's deadline holds."""
    from math_verify import parse, verify

    def judge(prompt: Prompt, response: str) -> Verdict:
        gold = str(prompt.answer)
        left = parse(gold if "$" in gold else f"${gold}$", parsing_timeout=None)  # type: ignore[arg-type]
        right = parse(response, parsing_timeout=None)  # type: ignore[arg-type]
        return Verdict(float(verify(left, right, timeout_seconds=None)))

    return judge


def string_match() -> Verifier:
    """The text of the last box, else the last number, equal to the gold's text; commas in numbers and blanks are left out."""

    def judge(prompt: Prompt, response: str) -> Verdict:
        boxes = re.findall(r"\\boxed\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}", response)
        found = boxes or re.findall(r"-?\d[\d,]*(?:\.\d+)?", response)
        left, right = (re.sub(r"\s|(?<=\d),(?=\d{3})", "", text) for text in (str(prompt.answer), found[-1] if found else ""))
        return Verdict(float(bool(right) and left == right))

    return judge


VERIFIERS: dict[str, tuple[str, dict[str, Any]]] = {
    "math_answer": ("math_answer", {}),
    "math_answer strict": ("math_answer", {"strict": True}),
    "numeric": ("numeric", {}),
    "exact": ("exact", {}),
    "Math-Verify": ("./agreement.py:math_verify", {}),
    "string match": ("./agreement.py:string_match", {}),
}
EXACT_AFTER = {"gsm8k_model_solutions": "A:", "mr_gsm8k": "####"}
"""The marker that the dataset's generators were trained to write; elsewhere there is none, and `exact` is left out."""


def judge_all(cases: list[Case], name: str, workers: int = 2) -> list[Verdict | None]:
    """One verdict a case; None where the verifier does not apply to the dataset."""
    ref, keys = VERIFIERS[name]
    groups: dict[str | None, list[int]] = {}
    for i, case in enumerate(cases):
        marker = EXACT_AFTER.get(case.dataset) if name == "exact" else None
        if name != "exact" or marker:
            groups.setdefault(marker, []).append(i)
    verdicts: list[Verdict | None] = [None] * len(cases)
    for marker, chosen in groups.items():
        items = [(Prompt(str(i), (), cases[i].gold), cases[i].response) for i in chosen]
        keywords = {**keys, "after": marker} if marker else keys
        with Scorer(ref, keywords, HERE.parent, workers=workers, timeout_s=TIMEOUT_S, max_failure_rate=1.0) as scorer:
            for i, verdict in zip(chosen, scorer.score(items), strict=True):
                verdicts[i] = verdict
    return verdicts


def count(cases: list[Case], verdicts: list[Verdict | None]) -> dict[str, dict[str, int]]:
    """dataset -> positives, negatives, tp, fp, unjudged."""
    found: dict[str, dict[str, int]] = {}
    for case, verdict in zip(cases, verdicts, strict=True):
        if verdict is None:
            continue
        row = found.setdefault(case.dataset, dict.fromkeys(("positives", "negatives", "tp", "fp", "unjudged"), 0))
        row["positives" if case.right else "negatives"] += 1
        row["unjudged"] += verdict.score is None
        if verdict.score == 1.0:
            row["tp" if case.right else "fp"] += 1
    return found


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("math-verify", "latex2sympy2_extended", "sympy")}


def rows(table: dict[str, dict[str, dict[str, int]]]) -> list[list[str]]:
    """Dataset, positives, negatives, then one cell a verifier: tp % / fp % (unjudged)."""

    def cell(c: dict[str, int] | None) -> str:
        if c is None:
            return "-"
        rates = (f"{100 * c[hit] / c[of]:.1f}" if c[of] else "-" for hit, of in (("tp", "positives"), ("fp", "negatives")))
        return " / ".join(rates) + (f" ({c['unjudged']})" if c["unjudged"] else "")

    datasets = list(table["math_answer"])
    return [
        [d, str(table["math_answer"][d]["positives"]), str(table["math_answer"][d]["negatives"]), *(cell(table[v].get(d)) for v in table)]
        for d in datasets
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds math/ and traces/")
    parser.add_argument("--every", type=int, default=1, help="take every N-th case of a dataset")
    parser.add_argument("--json", type=Path, help="write the counts here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    parser.add_argument("--wrong", default="", help="print every case in which this verifier and the label differ")
    args = parser.parse_args()
    cases = load(args.data, args.every)
    table: dict[str, dict[str, dict[str, int]]] = {}
    for name in VERIFIERS:
        verdicts = judge_all(cases, name)
        table[name] = count(cases, verdicts)
        for case, verdict in zip(cases, verdicts, strict=True):
            if name == args.wrong and verdict is not None and verdict.score != float(case.right):
                print(json.dumps([case.dataset, case.right, verdict.score, case.gold, verdict.answer or case.response[-80:], verdict.detail]))
    head = ["dataset", "positives", "negatives", *table]
    shown = Table(title="true positives % / false positives % (unjudged)")
    for column in head:
        shown.add_column(column)
    for row in rows(table):
        shown.add_row(*row)
    Console(width=160).print(shown)
    if args.json:
        args.json.write_text(json.dumps({"versions": versions(), "every": args.every, "table": table}, indent=1) + "\n", encoding="utf-8")
    if args.markdown:
        lines = [head, ["---"] * len(head), *rows(table)]
        args.markdown.write_text("".join(f"| {' | '.join(line)} |\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
