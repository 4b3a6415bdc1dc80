"""Verdicts a second of the verifier pool, beside one process, independent processes and concurrent.futures. Part of `make bench`.

    python scripts/bench_scoring.py [--workers 2] [--rows 2000] [--rounds 5] [--cases FILE.jsonl] [--json OUT]

For each verifier the four ways take turns, on rows that they have not seen (a cache of parsed answers would flatter the later ones):
  one process     verify(prompt, response) in a loop, in a process that does nothing else
  N processes     N such loops at once, each on its share: what the machine can give at all
  pool            llmrl.scoring.Scorer with N workers
  futures         concurrent.futures.ProcessPoolExecutor (spawn) with N workers, map(chunksize=16): no deadline, no kill, no status
All are warm: processes are started and the verifier is built before the clock runs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import random
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from llmrl import plugins
from llmrl.records import Prompt, Verdict, Verifier
from llmrl.scoring import Scorer

Rows = list[tuple[Prompt, str]]
HERE = Path(__file__).resolve()


def trivial() -> Verifier:
    """Compares two short texts: what is left is the cost of getting a row to a worker and its verdict back."""
    return lambda prompt, response: Verdict(float(response[-4:] == prompt.answer))


VERIFIERS = {"math_answer": "math_answer", "trivial": f"{HERE}:trivial"}


def made_rows(n: int, seed: int) -> Rows:
    """Fractions, surds and numbers with worked-looking responses of 300 to 900 characters, half of them right."""
    rng, rows = random.Random(seed), []
    for i in range(n):
        a, b, wrong = rng.randrange(2, 10**6), rng.randrange(2, 999), rng.random() < 0.5
        kind = rng.randrange(3)
        gold = (rf"\frac{{{a}}}{{{b}}}", rf"{b}\sqrt{{{a}}}", str(a))[kind]
        told = a + wrong
        said = (rf"\dfrac{{{2 * told}}}{{{2 * b}}}", rf"\sqrt{{{told}}} \cdot {b}", f"{told:,}.0")[kind]
        steps = "".join(f"Step {k}: we have ${rng.randrange(99)} + {rng.randrange(99)}x = y_{k}$ and go on.\n" for k in range(rng.randrange(6, 18)))
        rows.append((Prompt(f"{seed}-{i}", ({"role": "user", "content": "Compute."},), gold), f"{steps}So the answer is $\\boxed{{{said}}}$."))
    return rows


def read_rows(path: Path) -> Rows:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(Prompt(str(i), (), str(r["gold"])), r["response"]) for i, r in enumerate(rows)]


_built: dict[str, Any] = {}


def _verify(item: tuple[str, Prompt, str]) -> float | None:
    ref, prompt, response = item
    if ref not in _built:
        _built[ref] = plugins.use(ref, {}, home="llmrl.rewards", base=Path(), where="[verifier]")
    return _built[ref](prompt, response).score


def _loop(ref: str, pipe: Any) -> None:
    """A process of its own: told rows, answers how long the loop took."""
    _verify((ref, Prompt("warm", (), "1"), r"\boxed{1}"))
    pipe.send("ready")
    while (rows := pipe.recv()) is not None:
        start = time.perf_counter()
        for prompt, response in rows:
            _verify((ref, prompt, response))
        pipe.send(time.perf_counter() - start)


class Loops:
    """n processes that each run the plain loop."""

    def __init__(self, ref: str, n: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for _ in range(n):
            ours, theirs = context.Pipe()
            process = context.Process(target=_loop, args=(ref, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)
        for pipe in self.pipes:
            pipe.recv()

    def rate(self, rows: Rows) -> float:
        """Rows a second; the slowest process counts."""
        n = len(self.pipes)
        shares = [rows[k::n] for k in range(n)]
        for pipe, share in zip(self.pipes, shares, strict=True):
            pipe.send(share)
        return sum(len(share) / pipe.recv() for pipe, share in zip(self.pipes, shares, strict=True))

    def close(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.send(None)
            process.join()


def measure(ref: str, workers: int, rounds: int, rows_of: Any) -> dict[str, list[float]]:
    one, many = Loops(ref, 1), Loops(ref, workers)
    futures = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    rates: dict[str, list[float]] = {"one process": [], f"{workers} processes": [], "pool": [], "futures": []}
    with Scorer(ref, {}, Path(), workers=workers) as scorer:
        scorer.score(rows_of(-1)[: 64 * workers])
        list(futures.map(_verify, [(ref, *row) for row in rows_of(-2)[: 64 * workers]], chunksize=16))

        def pool(rows: Rows) -> float:
            start = time.perf_counter()
            scorer.score(rows)
            return len(rows) / (time.perf_counter() - start)

        def plain(rows: Rows) -> float:
            start = time.perf_counter()
            list(futures.map(_verify, [(ref, *row) for row in rows], chunksize=16))
            return len(rows) / (time.perf_counter() - start)

        ways = [one.rate, many.rate, pool, plain]
        for r in range(rounds):
            for k, (name, way) in enumerate(zip(rates, ways, strict=True)):
                rates[name].append(way(rows_of(4 * r + k)))
    one.close()
    many.close()
    futures.shutdown()
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rows", type=int, default=2000, help="rows a measurement (trivial: ten times as many)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", type=Path, help='rows {"gold", "response"} to take instead of made ones; each measurement gets another part of them')
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    given = read_rows(args.cases) if args.cases else []
    results: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "python": platform.python_version(), "workers": args.workers}
    ratios = "pool : N x one | pool : N processes | pool : futures | ms an item over N processes"
    print(f"| verifier | one process /s | N processes /s | pool /s | futures /s | {ratios} |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for name, ref in VERIFIERS.items():
        n = args.rows * (10 if name == "trivial" else 1)

        def rows_of(k: int, n: int = n) -> Rows:
            return [given[(k * n + i) % len(given)] for i in range(n)] if given else made_rows(n, 1000 + k)

        rates = measure(ref, args.workers, args.rounds, rows_of)
        one, many, pool, futures = (statistics.median(v) for v in rates.values())
        over = 1e3 * (args.workers / pool - args.workers / many)
        print(
            f"| {name} | {one:,.0f} | {many:,.0f} | {pool:,.0f} | {futures:,.0f} | {pool / (args.workers * one):.2f} | {pool / many:.2f} | "
            f"{pool / futures:.2f} | {over:.3f} |"
        )
        results[name] = rates
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
