"""Writes tests/golden/{segment,credit,losses}.json from the papers' formulas, in plain Python: no torch, nothing of llmrl.

Usage: python scripts/make_goldens.py [--check]      (--check writes nothing and fails where a file differs)

Rewards are exact fractions up to the first square root. `worked_credit.json` and `worked_losses.json` are not written by this script:
they are transcribed from a hand-worked table, and the tests compare both kinds with the same code.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "tests" / "golden"
Rows = list[list[float]]
Entry = dict[str, Any]


def num(x: float | str | None) -> Fraction | None:
    """A decimal as it is written, exactly: 0.1 is 1/10."""
    return None if x is None else Fraction(str(x))


# ---------------------------------------------------------------- segments


def segments(x: list[Any], index: list[int], n: int, where: list[bool], ddof: int) -> Entry:
    members = [[num(v) for v, i, w in zip(x, index, where, strict=True) if i == s and w] for s in range(n)]
    mean = [sum(m) / len(m) if m else None for m in members]
    var = [sum((v - a) ** 2 for v in m) / (len(m) - ddof) if len(m) > ddof else None for m, a in zip(members, mean, strict=True)]
    rank = []
    for v, i, w in zip(x, index, where, strict=True):
        below = sum(o < num(v) for o in members[i])
        rank.append(below + Fraction(sum(o == num(v) for o in members[i]) - 1, 2) if w else None)
    plain = {
        "sum": [sum(m) for m in members], "count": [len(m) for m in members], "mean": mean,
        "std": [None if v is None else math.sqrt(v) for v in var], "max": [max(m) if m else None for m in members], "rank": rank,
    }  # fmt: skip
    return {k: [None if v is None else float(v) for v in row] for k, row in plain.items()}


def segment_entries() -> list[Entry]:
    cases = [
        ("two full segments", [1, 0, 0, 1, 0, 0, 0, 1], [0, 0, 0, 0, 1, 1, 1, 1], 2, [True] * 8, 1),
        ("interleaved, one of one, one empty", [0.5, 2, -1, 0.25, 3, 0.5], [0, 2, 0, 0, 3, 3], 4, [True] * 6, 1),
        ("elements left out, ddof 0", [0.5, 2, -1, 0.25, 3, 0.5], [0, 2, 0, 0, 3, 3], 4, [True, False, True, False, True, True], 0),
    ]
    return [
        {
            "name": name, "inputs": {"x": x, "index": index, "n": n, "where": where, "ddof": ddof},
            "expected": segments(x, index, n, where, ddof), "source": "definitions, exact fractions; null = undefined", "tolerance": 1e-15,
        }
        for name, x, index, n, where, ddof in cases
    ]  # fmt: skip


# ---------------------------------------------------------------- credit: a is one number a sample, then one row of numbers a sample


def by_cohort(values: Sequence[Any], v: Entry) -> list[list[Any]]:
    """For each sample, the scored values of its cohort."""
    pairs = [(c, x) for c, x, r in zip(v["cohorts"], values, v["rewards"], strict=True) if r is not None]
    return [[x for c, x in pairs if c == own] for own in v["cohorts"]]


def center(a: list[Any], v: Entry) -> list[Any]:
    return [x - sum(m) / len(m) if m else 0 for x, m in zip(a, by_cohort(a, v), strict=True)]


def scale(a: list[Any], v: Entry, eps: float = 1e-6, ddof: int = 1) -> list[Any]:
    out = []
    for x, m in zip(a, by_cohort(a, v), strict=True):
        if len(m) <= ddof:
            out.append(x)
            continue
        mean = sum(m) / len(m)
        out.append(float(x) / (math.sqrt(sum((y - mean) ** 2 for y in m) / (len(m) - ddof)) + eps))
    return out


def rloo(a: list[Any], v: Entry) -> list[Any]:
    return [x - (sum(m) - x) / (len(m) - 1) if len(m) > 1 else 0 for x, m in zip(a, by_cohort(a, v), strict=True)]


def scale_batch(a: list[Any], v: Entry, eps: float = 1e-4) -> list[Any]:
    r = [num(x) for x in v["rewards"] if x is not None]
    mean = sum(r) / len(r)
    return [float(x) / (math.sqrt(sum((y - mean) ** 2 for y in r) / (len(r) - 1)) + eps) for x in a]


def overlong(a: list[Any], v: Entry, cache: int, limit: int | None = None, penalty: float = 1.0) -> list[Any]:
    top = limit or v["max_new_tokens"]
    punish = [0 if n <= top - cache else Fraction(top - cache - n, cache) if n <= top else -1 for n in v["lengths"]]
    return [x + num(penalty) * p for x, p in zip(a, punish, strict=True)]


def k1_rows(v: Entry) -> list[list[Fraction]]:
    pair = zip(v["streams"]["old_logp"], v["streams"]["ref_logp"], strict=True)
    return [[num(o) - num(r) for o, r in zip(*rows, strict=True)] for rows in pair]


def kl_in_reward(a: list[Any], v: Entry, coef: float) -> list[Any]:
    return [x - num(coef) * sum(k) for x, k in zip(a, k1_rows(v), strict=True)]


def kl_to_go(rows: list[list[Any]], v: Entry, coef: float) -> list[list[Any]]:
    return [[x - num(coef) * sum(k[t:]) for t, x in enumerate(row)] for row, k in zip(rows, k1_rows(v), strict=True)]


def whiten(rows: list[list[Any]], v: Entry, eps: float = 1e-8) -> list[list[Any]]:
    x = [y for row, r in zip(rows, v["rewards"], strict=True) if r is not None for y in row]
    mean = sum(x) / len(x)
    var = sum((y - mean) ** 2 for y in x) / (len(x) - 1)
    return [[float(y - mean) / math.sqrt(float(var) + eps) for y in row] for row in rows]


CREDIT: dict[str, Callable[..., Any]] = {
    f.__name__: f for f in (center, scale, rloo, scale_batch, overlong, kl_in_reward, kl_to_go, whiten)
}  # fmt: skip


def run_chain(chain: dict[str, list[Any]], v: Entry) -> Rows:
    a: Any = [num(r) if r is not None else Fraction(0) for r in v["rewards"]]
    for name, kwargs in chain.get("sample", []):
        a = CREDIT[name](a, v, **kwargs)
    a = [[x if r is not None else Fraction(0)] * n for x, r, n in zip(a, v["rewards"], v["lengths"], strict=True)]
    for name, kwargs in chain.get("token", []):
        a = CREDIT[name](a, v, **kwargs)
    return [[float(x) if r is not None else 0.0 for x in row] for row, r in zip(a, v["rewards"], strict=True)]


def credit_entries() -> list[Entry]:
    table = {"rewards": [1, 0, 0, 1, 0, 0, 0, 1], "cohorts": [0] * 4 + [1] * 4, "lengths": [1] * 8}
    odd: Entry = {
        "rewards": [0.25, 1, None, 0.5, 0, 1, 0.75, 0.3, 0.3, 0.3], "cohorts": [0, 1, 0, 0, 1, 1, 2, 3, 3, 3],
        "lengths": [2, 1, 3, 2, 1, 4, 1, 2, 1, 1], "max_new_tokens": 4,
    }  # fmt: skip
    kl: Entry = {
        "rewards": [1, 0, None, 0.5], "cohorts": [0, 0, 0, 0], "lengths": [2, 3, 1, 1],
        "streams": {
            "old_logp": [[-0.5, -1.0], [-0.2, -0.7, -0.3], [-5.0], [-1.5]], "ref_logp": [[-0.6, -0.8], [-0.4, -0.7, -0.1], [-0.1], [-1.0]],
        },
    }  # fmt: skip
    long = {"rewards": [1, 1, 0, 0], "cohorts": [0, 1, 2, 3], "lengths": [164, 184, 204, 205], "max_new_tokens": 204}
    grpo = {"sample": [["center", {}], ["scale", {"eps": 1e-6}]]}
    on_odd = [
        ("grpo", "2402.03300", grpo), ("center", "2503.20783", {"sample": [["center", {}]]}),
        ("rloo", "2402.14740", {"sample": [["rloo", {}]]}), ("batch std", "TRL", {"sample": [["center", {}], ["scale_batch", {}]]}),
        ("reinforce++", "2501.03262", {"token": [["whiten", {}]]}),
        ("dapo", "2503.14476", {"sample": [["overlong", {"cache": 2, "penalty": 0.5}], *grpo["sample"]]}),
    ]  # fmt: skip
    cases = [
        ("grpo", "2402.03300; ddof 1", grpo, table),
        ("grpo ddof 0", "2402.03300; (1-p)/p", {"sample": [["center", {}], ["scale", {"eps": 1e-6, "ddof": 0}]]}, table),
        ("dr_grpo", "2503.20783", {"sample": [["center", {}]]}, table),
        ("rloo", "2402.14740", {"sample": [["rloo", {}]]}, table),
        ("batch std", "TRL scale_rewards=batch", {"sample": [["center", {}], ["scale_batch", {"eps": 1e-4}]]}, table),
        ("reinforce++", "2501.03262", {"token": [["whiten", {}]]}, table),
        ("reinforce++ baseline", "2501.03262", {"sample": [["center", {}]], "token": [["whiten", {}]]}, table),
        *((f"{name}, unscored, interleaved, cohort of one, ties", source, chain, odd) for name, source, chain in on_odd),
        ("overlong at 0.8 L, 0.9 L, L, L + 1", "2503.14476 eq. 13", {"sample": [["overlong", {"cache": 40}]]}, long),
        ("overlong with its own limit", "2503.14476 eq. 13", {"sample": [["overlong", {"cache": 20, "limit": 184}]]}, long),
        ("k1 in the reward, then rloo", "2402.14740", {"sample": [["kl_in_reward", {"coef": 0.05}], ["rloo", {}]]}, kl),
        ("k1 to go", "2501.03262", {"token": [["kl_to_go", {"coef": 0.1}]]}, kl),
        ("k1 to go, whitened", "2501.03262", {"token": [["kl_to_go", {"coef": 0.1}], ["whiten", {}]]}, kl),
    ]  # fmt: skip
    return [
        {
            "name": name, "inputs": {**v, "chain": chain}, "expected": {"adv": run_chain(chain, v)},
            "source": f"formula of {source}, exact fractions", "tolerance": 1e-12,
        }
        for name, source, chain, v in cases
    ]  # fmt: skip


# ---------------------------------------------------------------- losses: (l_t, d l_t / d logp_t) of one token; for gspo of one row


def ratio(lp: float, old: float) -> tuple[float, float]:
    """exp of the log-ratio clamped to [-20, 20], and its derivative by lp."""
    d = lp - old
    r = math.exp(min(max(d, -20.0), 20.0))
    return r, r if abs(d) <= 20 else 0.0


def clipped(r: float, dr: float, a: float, low: float, high: float) -> tuple[float, float]:
    bounded = min(max(r, 1 - low), 1 + high)
    return (-r * a, -dr * a) if -r * a >= -bounded * a else (-bounded * a, 0.0)


def pg_clip(t: Entry, low: float = 0.2, high: float = 0.2, dual: float | None = None) -> tuple[float, float]:
    loss, slope = clipped(*ratio(t["logp"], t["old"]), t["adv"], low, high)
    if dual is not None and t["adv"] < 0 and loss > -dual * t["adv"]:
        return -dual * t["adv"], 0.0
    return loss, slope


def gspo(t: Entry, low: float = 3e-4, high: float = 4e-4) -> tuple[float, float]:
    if t["weight"] == 0:
        return 0.0, 0.0
    s = math.exp(sum(x - y for x, y in zip(t["row_logp"], t["row_old"], strict=True)) / len(t["row_logp"]))
    return clipped(s, s, t["adv"], low, high)


def cispo(t: Entry, ratio_max: float = 5.0, ratio_min: float = 0.0) -> tuple[float, float]:
    w = min(max(ratio(t["logp"], t["old"])[0], ratio_min), ratio_max)
    return -w * t["adv"] * t["logp"], -w * t["adv"]


def kl_k3(t: Entry) -> tuple[float, float]:
    d = t["ref"] - t["logp"]
    return math.exp(d) - d - 1, 1 - math.exp(d)


def mismatch(
    t: Entry, inner: list[Any], how: str = "truncate", ratio_max: float = 2.0, ratio_min: float = 0.0, over: str = "token"
) -> tuple[float, float]:
    gap = [(t["old"], t["behavior"])] if over == "token" else list(zip(t["row_old"], t["row_behavior"], strict=True))
    w = math.exp(sum(o - b for o, b in gap if b is not None))
    w = min(w, ratio_max) if how == "truncate" else w if ratio_min <= w <= ratio_max else 0.0
    loss, slope = LOSSES[inner[0]](t, **inner[1])
    return w * loss, w * slope


LOSSES: dict[str, Callable[..., tuple[float, float]]] = {
    "pg_clip": pg_clip, "gspo": gspo, "cispo": cispo, "kl_k3": kl_k3,
    "reinforce": lambda t: (-t["adv"] * t["logp"], -t["adv"]),
    "ce": lambda t: (-t["logp"], -1.0),
    "kl_k1": lambda t: (t["logp"] - t["ref"], 1.0),
    "kl_k2": lambda t: ((t["logp"] - t["ref"]) ** 2 / 2, t["logp"] - t["ref"]),
    "entropy_bonus": lambda t: (-t["entropy"], -1.0),
}  # fmt: skip


def loss_entry(name: str, source: str, spec: list[Any], data: Entry) -> Entry:
    values: Rows = []
    slopes: Rows = []
    for i, row in enumerate(data["logp"]):
        w = data.get("weight", [1.0] * len(data["logp"]))[i]
        tokens = []
        for j in range(len(row)):
            t: Entry = {"adv": data["adv"][i], "weight": w}
            for key in ("logp", "old", "ref", "behavior", "entropy"):
                if key in data:
                    t[key], t[f"row_{key}"] = data[key][i][j], data[key][i]
            tokens.append(mismatch(t, spec[2], **spec[1]) if spec[0] == "mismatch" else LOSSES[spec[0]](t, **spec[1]))
        values.append([v for v, _ in tokens])
        slopes.append([s for _, s in tokens])
    w = data.get("weight", [1.0] * len(values))
    total = sum(a * sum(row) for a, row in zip(w, values, strict=True))
    reduced = {
        "token": total / sum(a * len(row) for a, row in zip(w, values, strict=True)),
        "sample": sum(a * sum(row) / len(row) for a, row in zip(w, values, strict=True)) / sum(w),
        "fixed 8": total / (8 * sum(w)), "fixed 1": total / sum(w),
    }  # fmt: skip
    expected = {"l": values, "grad": slopes, **reduced}
    return {"name": name, "inputs": {"loss": spec, **data}, "expected": expected, "source": source, "tolerance": 1e-12}


def loss_entries() -> list[Entry]:
    table: Entry = {
        "logp": [[-0.5, -1.0, -0.2], [-0.7, -0.3, -1.5, -0.9]], "old": [[-0.9, -0.9, -0.2], [-0.6, -0.7, -1.4, -0.5]], "adv": [1.0, -1.0],
        "ref": [[-0.6, -1.1, -0.2], [-0.7, -0.5, -1.5, -1.0]], "behavior": [[-0.4, -1.5, -0.2], [-0.65, -0.7, -2.6, -0.5]],
        "entropy": [[0.3, 0.9, 0.1], [1.1, 0.4, 1.3, 0.8]],
    }  # fmt: skip
    weighted: Entry = {"logp": [*table["logp"], [-0.4, -2.0]], "old": [*table["old"], [-0.1, -2.5]], "adv": [0.7, -1.3, 5.0]}
    weighted["weight"] = [1.0, 2.0, 0.0]
    extreme = {"logp": [[-0.5, -30.0], [-0.5, -30.0]], "old": [[-40.5, -0.5], [-40.5, -0.5]], "adv": [1.0, -2.0]}
    gaps = {**table, "behavior": [[-0.4, None, -0.2], [None, None, None, None]]}
    higher = ["pg_clip", {"low": 0.2, "high": 0.28}]
    specs: list[tuple[str, list[Any], Entry]] = [
        ("2402.03300", ["pg_clip", {"low": 0.2, "high": 0.2}], table),
        ("2503.14476", higher, table),
        ("1912.09729", ["pg_clip", {"dual": 1.3}], table),
        ("2507.18071", ["gspo", {}], table),
        ("2507.18071, wide bounds: nothing clipped", ["gspo", {"low": 0.5, "high": 0.5}], table),
        ("2506.13585", ["cispo", {"ratio_max": 1.28}], table),
        ("2506.13585, both bounds", ["cispo", {"ratio_max": 1.28, "ratio_min": 0.8}], table),
        ("Williams 1992", ["reinforce", {}], table),
        ("cross-entropy", ["ce", {}], table),
        ("Schulman 2020", ["kl_k1", {}], table), ("Schulman 2020", ["kl_k2", {}], table), ("Schulman 2020", ["kl_k3", {}], table),
        ("entropy; gradient by the entropy", ["entropy_bonus", {}], table),
        ("TIS", ["mismatch", {"ratio_max": 2.0}, higher], table),
        ("sequence TIS", ["mismatch", {"ratio_max": 2.0, "over": "sample"}, higher], table),
        ("token masking", ["mismatch", {"how": "mask", "ratio_min": 0.5, "ratio_max": 2.0}, higher], table),
        ("sequence MIS", ["mismatch", {"how": "mask", "ratio_min": 0.5, "ratio_max": 2.0, "over": "sample"}, higher], table),
        ("TIS; tokens without behavior_logp get weight 1", ["mismatch", {}, higher], gaps),
        ("TIS; as before, sequence", ["mismatch", {"over": "sample"}, ["cispo", {}]], gaps),
        *((f"weights 1, 2 and 0; {name}", [name, {}], weighted) for name in ("pg_clip", "gspo", "cispo", "reinforce")),
        ("log-ratios of +-40 are clamped to +-20, without gradient", ["pg_clip", {}], extreme),
        ("log-ratios of +-40", ["cispo", {}], extreme),
    ]  # fmt: skip
    return [loss_entry(f"{json.dumps(spec)} on {len(d['logp'])} rows: {src}", f"formula of {src}", spec, d) for src, spec, d in specs]


def same(a: Any, b: Any) -> bool:
    """Equal, numbers to 1e-13 relative: the last bit of exp differs between C libraries."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) or isinstance(b, float):
        return a is not None and b is not None and math.isclose(a, b, rel_tol=1e-13, abs_tol=1e-15)
    return a == b


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the golden numbers that follow from formulas.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a file differs")
    check = parser.parse_args().check
    stale = []
    for name, entries in {"segment": segment_entries(), "credit": credit_entries(), "losses": loss_entries()}.items():
        file = FOLDER / f"{name}.json"
        text = "[\n" + ",\n".join(json.dumps(e) for e in entries) + "\n]\n"
        if not check:
            file.write_text(text, encoding="utf-8")
        elif not file.is_file() or not same(json.loads(file.read_text(encoding="utf-8")), json.loads(text)):
            stale.append(file.name)
    if stale:
        sys.stderr.write(f"not what make_goldens.py computes: {', '.join(stale)}; run python scripts/make_goldens.py\n")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
