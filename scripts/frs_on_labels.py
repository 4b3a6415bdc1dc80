"""Do traces that a model is surer of have fewer labelled errors? No judge: people's step labels, and the model's probability of the given texts.

    python scripts/frs_on_labels.py TRACES.jsonl.gz ... --out scores.jsonl [--model smollm2] [--per-source 60] [--seconds 420]
    python scripts/frs_on_labels.py --out scores.jsonl --table [--json table.json]

Rows: {id, source, problem, steps, first_error_step (-1 none, null unlabelled), final_answer_correct}.
The model reads problem and steps teacher-forced (`engine.score`: raw softmax, temperature 1). It is not the model that wrote them, so this
tests the confidence measures as detectors of errors, not a model's knowledge of its own. Scores are appended, a line a trace: a second
call goes on. Sources take turns, and within each the two labels, in a fixed random order: a stop by --seconds leaves all about even (an
AUROC does not depend on the shares of the labels). Texts beyond --max-chars are left out, which favours short solutions.

Table, for each source: AUROC of "surer" for "free of errors" (0.5 = no information), 95 % bootstrap interval over traces, for each
measure and for the text's shortness alone; and, over traces with an error, the share of right steps that are surer than the first
wrong one: of the steps before it, and of right steps at the same place in other traces. Sources with one label only have no AUROC.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from llmrl.evaluation.confidence import tail_mean
from llmrl.evaluation.estimator import resample_sums
from llmrl.evaluation.transfer import ranks

MEASURES = ("tail 5 %", "tail 10 %", "tail 20 %", "mean log-prob", "least", "shortness", "tail 10 %, length held")
HELD = MEASURES[-1]
"""What is left of the paper's measure, as a rank within the source, when a straight line over the rank of the length is taken off."""
ERRORS = ("first wrong step below the steps before it", "below right steps at its place elsewhere")
MIN_CLASS = 5
"""Traces of either label that an AUROC needs."""


def is_good(row: dict[str, Any]) -> bool:
    """No wrong step where steps are labelled, else the right final answer."""
    return row["first_error_step"] == -1 if row["first_error_step"] is not None else bool(row["final_answer_correct"])


def read_rows(paths: list[Path], per_source: int, max_chars: int, only: list[str]) -> list[dict[str, Any]]:
    """Up to per_source rows of each source, in turns, its two labels in turns."""
    sources: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in paths:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                wanted = not only or any(name in row["source"] for name in only)
                labelled = row["first_error_step"] is not None or row["final_answer_correct"] is not None
                if wanted and labelled and 0 < sum(map(len, row["steps"])) <= max_chars:
                    sources[row["source"]].append(row)
    chosen = []
    for rows in sources.values():
        rows.sort(key=lambda r: hashlib.sha256(r["id"].encode()).digest())
        good, bad = [r for r in rows if is_good(r)], [r for r in rows if not is_good(r)]
        both = min(len(good), len(bad))
        turns = [r for pair in zip(good, bad, strict=False) for r in pair]
        chosen.append([*turns, *good[both:], *bad[both:]][:per_source])
    return [rows[i] for i in range(per_source) for rows in chosen if i < len(rows)]


def score(rows: list[dict[str, Any]], model: str, out: Path, seconds: float, chunk: int) -> None:
    import torch

    from llmrl.hf_engine import HFEngine
    from llmrl.models import load_policy
    from llmrl.recipe import Model

    done = {json.loads(line)["id"] for line in out.read_text().splitlines()} if out.exists() else set()
    todo = [r for r in rows if r["id"] not in done]
    policy = load_policy(Model(path=model), device="cuda" if torch.cuda.is_available() else "cpu")
    engine, tokenize = HFEngine(policy), policy.chat.tokenizer
    begun, tokens = time.monotonic(), 0
    with out.open("a", encoding="utf-8") as file:
        for a in range(0, len(todo), chunk):
            if time.monotonic() - begun > seconds:
                break
            pairs, kept = [], []
            for row in todo[a : a + chunk]:
                steps = [tokenize(s.rstrip() + "\n", add_special_tokens=False)["input_ids"] for s in row["steps"]]
                pairs.append((policy.chat.prompt_ids([{"role": "user", "content": row["problem"]}]), [i for s in steps for i in s]))
                kept.append((row, [len(s) for s in steps]))
            for (row, lengths), logps in zip(kept, engine.score(pairs), strict=True):
                tokens += len(logps)
                file.write(json.dumps(scored(row, lengths, np.array(logps))) + "\n")
            file.flush()
    took = time.monotonic() - begun
    scored_now = len(out.read_text().splitlines()) - len(done)
    print(f"{scored_now} traces, {tokens} tokens in {took:.0f} s ({tokens / took:.0f} a second); {len(todo) - scored_now} to go", file=sys.stderr)


def scored(row: dict[str, Any], lengths: list[int], logp_T: np.ndarray) -> dict[str, Any]:
    ends = np.cumsum(lengths)
    steps = [tail_mean(logp_T[end - n : end]) if n else None for n, end in zip(lengths, ends, strict=True)]
    measures = [tail_mean(logp_T, 0.05), tail_mean(logp_T), tail_mean(logp_T, 0.2), float(logp_T.mean()), float(np.exp(logp_T.min())), -float(len(logp_T))]
    return {
        "id": row["id"], "source": row["source"], "first_error_step": row["first_error_step"], "final_answer_correct": row["final_answer_correct"],
        **dict(zip(MEASURES[:-1], measures, strict=True)), "steps": steps,
    }  # fmt: skip


# ---------------------------------------------------------------- the table


def auroc(value: np.ndarray, good: np.ndarray) -> float:
    """Chance that a good trace has a larger value than a bad one, ties half (Mann-Whitney)."""
    n = int(good.sum())
    return float((ranks(value)[good].sum() - n * (n + 1) / 2) / (n * (len(good) - n)))


def without(value: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Ranks of `value` less their regression on the ranks of `other`."""
    a, b = ranks(value) - (len(value) + 1) / 2, ranks(other) - (len(other) + 1) / 2
    return a - b * float(a @ b) / max(float(b @ b), 1e-12)


def with_interval(value: np.ndarray, good: np.ndarray, resamples: int, seed: int) -> tuple[float, float, float]:
    """AUROC and its percentile interval: good and bad traces are resampled each for themselves."""
    rng = np.random.default_rng(seed)
    wins = (value[good][:, None] > value[~good]) + 0.5 * (value[good][:, None] == value[~good])
    a, b = wins.shape
    draws = [float(rng.multinomial(a, np.full(a, 1 / a)) @ wins @ rng.multinomial(b, np.full(b, 1 / b))) / (a * b) for _ in range(resamples)]
    return auroc(value, good), *np.percentile(draws, [2.5, 97.5])


def right_steps(row: dict[str, Any]) -> list[float | None]:
    """Confidence of the steps that are known to be right: all of a trace without an error, else those before the first wrong one."""
    return row["steps"] if row["first_error_step"] == -1 else row["steps"][: row["first_error_step"] or 0]


def first_errors(rows: list[dict[str, Any]], resamples: int, seed: int, *, elsewhere: bool) -> tuple[int, float, float, float] | None:
    """(traces, share of right steps that are surer than the first wrong one, interval over traces).

    The right steps are those before it, or, elsewhere: those at its own place in other traces of the source. The latter is the fair
    comparison: a reader grows surer from step to step, whatever is right.
    """
    pairs = []
    for r in rows:
        e = r["first_error_step"]
        if e is None or not 0 <= e < len(r["steps"]) or r["steps"][e] is None:
            continue
        if elsewhere:
            others = [right_steps(o) for o in rows if o["source"] == r["source"] and o["id"] != r["id"] and o["first_error_step"] is not None]
            right = [o[e] for o in others if e < len(o)]
        else:
            right = r["steps"][:e]
        known = [s for s in right if s is not None]
        if known:
            pairs.append((sum((s > r["steps"][e]) + 0.5 * (s == r["steps"][e]) for s in known) / len(known), 1.0))
    if len(pairs) < MIN_CLASS:
        return None
    sums = resample_sums(np.array(pairs), resamples, np.random.default_rng(seed))
    assert sums is not None
    low, high = np.percentile(sums[:, 0] / sums[:, 1], [2.5, 97.5])
    return len(pairs), float(np.mean([p for p, _ in pairs])), float(low), float(high)


def table(rows: list[dict[str, Any]], resamples: int = 2000, seed: int = 0) -> list[dict[str, Any]]:
    """One row a source, and a pooled one of the sources with both labels (values there as ranks within the source)."""
    sources: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for r in rows:
        sources[r["source"]].append(r)
    found, pooled = [], []
    for name, own in sorted(sources.items()):
        stepwise = [r for r in own if r["first_error_step"] is not None]
        used, label = (stepwise, "no wrong step") if stepwise else (own, "right answer")
        good = np.array([is_good(r) for r in used], bool)
        line: dict[str, Any] = {"source": name, "label": label, "traces": len(used), "good": int(good.sum())}
        if min(good.sum(), (~good).sum()) >= MIN_CLASS:
            columns = {m: np.array([r[m] for r in used]) for m in MEASURES if m != HELD}
            columns[HELD] = without(columns["tail 10 %"], columns["shortness"])
            line |= {m: with_interval(v, good, resamples, seed) for m, v in columns.items()}
            if stepwise:
                pooled.append((good, {m: ranks(v) / len(v) for m, v in columns.items()}))
        line |= {name: first_errors(own, resamples, seed, elsewhere=i == 1) for i, name in enumerate(ERRORS)}
        found.append(line)
    if len(pooled) > 1:
        good = np.concatenate([g for g, _ in pooled])
        line = {"source": "all with both labels, ranked within the source", "label": "no wrong step", "traces": len(good), "good": int(good.sum())}
        found.append(line | {m: with_interval(np.concatenate([c[m] for _, c in pooled]), good, resamples, seed) for m in MEASURES})
        found[-1] |= {name: first_errors(rows, resamples, seed, elsewhere=i == 1) for i, name in enumerate(ERRORS)}
    return found


def show(found: list[dict[str, Any]]) -> str:
    lines = ["| source | label | traces (good) | " + " | ".join(MEASURES) + " | " + " | ".join(ERRORS) + " |",
             "|---|---|---:|" + "---|" * (len(MEASURES) + 2)]  # fmt: skip
    for r in found:
        cells = [f"{r[m][0]:.2f} [{r[m][1]:.2f}, {r[m][2]:.2f}]" if m in r else "-" for m in MEASURES]
        cells += [f"{e[1]:.2f} [{e[2]:.2f}, {e[3]:.2f}] ({e[0]})" if (e := r[name]) else "-" for name in ERRORS]
        lines.append(f"| {r['source']} | {r['label']} | {r['traces']} ({r['good']}) | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="*", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--per-source", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=420)
    parser.add_argument("--chunk", type=int, default=8)
    parser.add_argument("--max-chars", type=int, default=1200)
    parser.add_argument("--source", action="append", default=[], help="only sources whose name holds this; may be given several times")
    parser.add_argument("--table", action="store_true", help="only print the table of what --out holds")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not args.table:
        if not args.traces:
            parser.error("name the trace files to score, or give --table")
        score(read_rows(args.traces, args.per_source, args.max_chars, args.source), args.model, args.out, args.seconds, args.chunk)
    found = table([json.loads(line) for line in args.out.read_text().splitlines()])
    print(show(found))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
