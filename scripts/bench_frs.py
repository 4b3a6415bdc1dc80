"""Traces a second of the FRS evaluator's first pass (read, confidence, filter), and the memory it takes. No judge, no model.

    python scripts/bench_frs.py [--traces 1000000] [--tokens 100] [--samples 16] [--strict] [--file PATH] [--json OUT]

Writes synthetic traces to a gzip file (kept with --file, else removed), then in a fresh process streams it through `read_any`, `scan`
and `kept`, and tells the seconds and the process's largest resident memory. The writing is not timed.
"""

from __future__ import annotations

import argparse
import gzip
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


def write(path: Path, traces: int, tokens: int, samples: int) -> None:
    """Lines made from a few hundred patterns: what counts is their size and that they differ in id, problem and probabilities."""
    rng = np.random.default_rng(0)
    patterns = []
    for _ in range(500):
        ids, logps = rng.integers(0, 50_000, tokens).tolist(), np.round(-rng.exponential(0.4, tokens), 6).tolist()
        patterns.append(f'"response": "{"so 12 + 7 = 19, " * (tokens // 5)}", "token_ids": {ids}, "raw_logprobs": {logps[:-1]}'[:-1])
    with gzip.open(path, "wt", compresslevel=1, encoding="utf-8") as file:
        for i in range(traces):
            problem, sample = divmod(i, samples)
            last = -0.000001 * (i * 7919 % 1_000_003) - 0.001
            file.write(
                f'{{"schema": 2, "id": "bench-{problem:06}/{sample}", "prompt_id": "bench-{problem:06}", "prompt": "What is it?", "gold": "19", "model": "m", '
                f'"sample": {sample}, "score": {(i * 31) % 3 // 2}.0, "status": "ok", "finish": "stop", {patterns[i % 500]}, {last:.6f}]}}\n'
            )


def measure(path: Path, strict: bool) -> dict[str, float]:
    from llmrl.evaluation.confidence import Confidence, Guard
    from llmrl.evaluation.importers import read_any
    from llmrl.evaluation.pool import composition, diagnostics, ece, kept, scan

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun, cpu = time.perf_counter(), time.process_time()
    (pool,) = scan(read_any(path), Confidence(guard=Guard() if strict else None)).values()
    read, cpu = time.perf_counter() - begun, time.process_time() - cpu
    index = kept(pool, 0.10)
    found = composition(pool, index), diagnostics(pool, index), ece(pool)
    assert len(index) == max(1, len(pool) // 10) and found[0]["kept"] == len(index)
    return {
        "traces": len(pool), "scan_s": read, "scan_cpu_s": cpu, "filter_s": time.perf_counter() - begun - read, "traces_per_s": len(pool) / read,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "start_mb": before / 1024,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--strict", action="store_true", help="with the repetition guard")
    parser.add_argument("--file", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.file, args.strict)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = args.file or Path(folder) / "traces.jsonl.gz"
        if not path.exists():
            write(path, args.traces, args.tokens, args.samples)
        command = [sys.executable, __file__, "--measure", "--file", str(path), *(["--strict"] if args.strict else [])]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        found |= {"tokens": args.tokens, "file_mb": path.stat().st_size / 1e6, "strict": args.strict, "cpu": platform.processor() or platform.machine()}
    rate = found["traces_per_s"]
    print(
        f"{found['traces']} traces of {args.tokens} tokens ({found['file_mb']:.0f} MB gzip): {found['scan_s']:.0f} s ({found['scan_cpu_s']:.0f} s of CPU), "
        f"{rate:.0f} traces/s, {rate * args.tokens / 1e6:.2f} M tokens/s; filter and tables {found['filter_s']:.1f} s; peak memory {found['peak_mb']:.0f} MB"
    )
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
