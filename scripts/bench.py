"""`make bench`: one RL step of llmrl beside one of TRL's GRPOTrainer, on the same model, prompts, forced lengths and rewards.

Rounds alternate (TRL, llmrl, TRL, llmrl, ...); each side runs in a process of its own with the same number of threads. Completion k of
prompt p has `length_of(p, k)` tokens on both sides: TRL by a logits processor that bans the end token until then and forces it there,
llmrl by a length limit of its own for each request. The reward is a hash of (p, k), so every group has a spread. Token counts, rewards
and advantages of the two sides are compared; a difference is an error. Model, TRL's side, precision of both heads: bench_trl.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from llmrl.records import Prompt, Request, Sampling, Verdict, Verifier

HERE = Path(__file__).resolve()
LR, STD_EPS, CLIP_NORM = 1e-6, 1e-4, 1.0
"""Both sides. STD_EPS is TRL's; llmrl's own default is 1e-6."""


@dataclass(frozen=True)
class Shape:
    """What one step does. Lengths are uniform between `shortest` and `longest`."""

    name: str
    model: str
    dtype: str
    prompts: int
    group: int
    shortest: int
    longest: int
    micro: int
    """TRL: per_device_train_batch_size; the rest by gradient accumulation."""
    tokens: int
    """llmrl: batch.tokens."""
    even: bool = False
    """Every completion has `longest` tokens: takes the padding out of the comparison."""

    def length_of(self, p: int, k: int) -> int:
        return self.longest if self.even else self.shortest + _hash(p, k, "length") % (self.longest - self.shortest + 1)

    def question(self, p: int) -> str:
        """A prompt text; uneven in length."""
        sums = "+".join(str(_hash(p, i, "term") % 90 + 10) for i in range(2 + _hash(p, 0, "terms") % 3))
        ask = f"What is {sums}?"
        if self.name == "smollm2":
            ask += " Think step by step, and write every intermediate result on a line of its own." * (_hash(p, 0, "ask") % 4)
        return ask


SHAPES = {
    "tiny": Shape("tiny", "Llama of 3.1M parameters, made on the spot", "float32", 64, 8, 4, 28, 32, 2048),
    "smollm2": Shape("smollm2", "SmolLM2-135M-Instruct", "bfloat16", 8, 8, 8, 64, 8, 640),
}


def _hash(*key: Any) -> int:
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:6])


def reward_of(p: int, k: int) -> float:
    return _hash(p, k, "reward") % 1001 / 1000


def judge() -> Verifier:
    """The verifier of llmrl's side; `Numbered` says which sample of its prompt a response is."""

    def verify(prompt: Prompt, response: str) -> Verdict:
        return Verdict(reward_of(int(prompt.id), prompt.meta["sample"]))

    return verify


# ---------------------------------------------------------------- llmrl's side


@dataclass(frozen=True)
class _Cut(Sampling):
    """Sampling parameters that are equal whatever the length limit: rows of unlike limits are still drawn together."""

    max_new_tokens: int = field(default=256, compare=False)


class ForcedEngine:
    """The session's engine with a length limit for each request."""

    def __init__(self, engine: Any, shape: Shape):
        self.engine, self.shape = engine, shape
        engine.policy = replace(engine.policy, stop_ids=frozenset())  # rows end by length alone

    @property
    def policy_version(self) -> int:
        return self.engine.policy_version

    def load_weights(self, version: int, weights: Any) -> None:
        self.engine.load_weights(version, weights)

    def generate(self, requests: list[Request]) -> Any:
        limit = [self.shape.length_of(int(r.seed[2]), int(r.seed[3])) for r in requests]  # seed = (recipe seed, step, prompt id, sample)
        return self.engine.generate([replace(r, sampling=_Cut(max_new_tokens=n)) for r, n in zip(requests, limit, strict=True)])


class Numbered:
    """The session's scorer; tells each item its sample number."""

    def __init__(self, scorer: Any, group: int):
        self.scorer, self.group = scorer, group

    def score(self, items: list[tuple[Prompt, str]]) -> Any:
        return self.scorer.score([(replace(p, meta={"sample": i % self.group}), text) for i, (p, text) in enumerate(items)])

    def stats(self) -> dict[str, float]:
        return self.scorer.stats()

    def close(self) -> None:
        self.scorer.close()


def write_recipe(shape: Shape, steps: int, model: str, work: Path) -> Path:
    rows = [{"id": str(p), "prompt": shape.question(p), "answer": "0"} for p in range(shape.prompts * steps)]
    (work / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    recipe = work / "bench.toml"
    recipe.write_text(f"""steps = {steps}
run.dir = {str(work / "run")!r}
model = {{ path = {model!r}, dtype = "{shape.dtype}" }}
data = {{ path = "./rows.jsonl", shuffle = false }}
eval = {{ data = {{ path = "./rows.jsonl" }} }}
rollout = {{ prompts = {shape.prompts}, group = {shape.group}, max_new_tokens = {shape.longest} }}
rule = {{ use = "dapo", dynamic_rounds = 0, std_eps = {STD_EPS} }}
verifier = {{ use = {f"{HERE}:judge"!r} }}
batch = {{ tokens = {shape.tokens} }}
optim = {{ lr = {LR}, clip_norm = {CLIP_NORM} }}
""")
    return recipe


def run_llmrl(shape: Shape, steps: int, model: str, work: Path) -> dict[str, Any]:
    """`steps` times llmrl.step.run_step, as `llmrl train` runs it. The first step is the caller's to leave out."""
    import llmrl.step as step_module
    from llmrl.config import load_recipe
    from llmrl.session import open_session

    session = open_session(load_recipe(write_recipe(shape, steps, model, work)))
    session.learner.start(session.recipe.optim)
    session.engine, session.scorer = ForcedEngine(session.engine, shape), Numbered(session.scorer, shape.group)
    packed, laid_out = step_module.pack, []

    def pack(*args: Any, **how: Any) -> Any:
        batches = packed(*args, **how)
        for b in batches:  # a short row repeats its last index up to the batch's row length
            filled = len(b.index_RL) + int((b.index_RL[:, 1:] != b.index_RL[:, :-1]).sum())
            laid_out.append((b.index_RL.numel(), filled, len(b.ids_P)))
        return batches

    step_module.pack = pack
    rows = []
    try:
        for step in range(1, steps + 1):
            laid_out.clear()
            began, cpu = time.perf_counter(), time.process_time()
            groups, adv, row = step_module.run_step(session, step)
            step_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu
            lengths = [len(s.token_ids) for g in groups for s in g.samples]
            places, filled, inputs = (sum(x) for x in zip(*laid_out, strict=True))
            part = {name: row[f"time/{name}_s"] for name in ("generate", "score", "update")}
            rows.append({
                "step_s": step_s, "cpu_s": cpu_s, **{f"{k}_s": v for k, v in part.items()}, "rest_s": step_s - sum(part.values()),
                "lengths": lengths, "prompt_tokens": sum(len(g.samples[0].context_ids) for g in groups), "decode_slots": sum(lengths),
                "positions": inputs, "padding": 0.0, "attention_padding": 1 - filled / places, "micro_batches": len(laid_out),
                "rewards": [s.reward for g in groups for s in g.samples], "advantages": [float(a[0]) for a in adv],
                "logp_gap_max": row["logp_gap/max_nats"],
            })  # fmt: skip
        workers = sum(_high_water(w.process.pid) for w in session.scorer.scorer._workers)
    finally:
        session.close()
    return {"steps": rows, "peak_gb": peak_gb(), "workers_gb": workers / 1e9}


def _high_water(pid: int) -> int:
    """Largest resident size of a process so far, bytes; 0 where /proc does not tell."""
    status = Path(f"/proc/{pid}/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith("VmHWM")), 0)


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


# ---------------------------------------------------------------- the comparison


def run_side(side: str, shape: Shape, steps: int, model: str, threads: int, log: Path) -> dict[str, Any]:
    """One side in a process of its own; its output goes to `log`."""
    with tempfile.TemporaryDirectory(prefix="llmrl-bench-") as work:
        result = Path(work) / "result.json"
        task = {"side": side, "shape": asdict(shape), "steps": steps, "model": model, "threads": threads, "work": work}
        task["result"] = str(result)
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        # llmrl tells glibc to keep freed memory (session.py); TRL gets the same, or it would pay for page faults that are no merit of ours
        env |= {"MALLOC_MMAP_THRESHOLD_": str(2**31 - 1), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
        env |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
        script = HERE if side == "llmrl" else HERE.with_name("bench_trl.py")
        with log.open("a") as out:
            done = subprocess.run([sys.executable, str(script), "--task", json.dumps(task)], stdout=out, stderr=out, env=env, check=False)
        if done.returncode or not result.is_file():
            sys.exit(f"bench: {side}, shape {shape.name}, ended with code {done.returncode}; the end of {log}:\n{log.read_text()[-3000:]}")
        return json.loads(result.read_text())


def run_task(text: str, sides: dict[str, Any]) -> None:
    """The child: runs one side and writes its result."""
    import torch

    task = json.loads(text)
    torch.set_num_threads(task["threads"])
    result = sides[task["side"]](Shape(**task["shape"]), task["steps"], task["model"], Path(task["work"]))
    Path(task["result"]).write_text(json.dumps(result))


def check_same(shape: Shape, trl: dict[str, Any], ours: dict[str, Any]) -> None:
    """Stops the benchmark unless both sides did the same work."""
    for n, (a, b) in enumerate(zip(trl["steps"], ours["steps"], strict=True), 1):
        wanted = [shape.length_of(p, k) for p in range((n - 1) * shape.prompts, n * shape.prompts) for k in range(shape.group)]
        for name, side in (("TRL", a), ("llmrl", b)):
            if side["lengths"] != wanted:
                bad = [(i, x, y) for i, (x, y) in enumerate(zip(side["lengths"], wanted, strict=True)) if x != y]
                sys.exit(f"bench: step {n}: {name} generated other lengths than forced; (completion, got, wanted): {bad[:5]}")
        if a["prompt_tokens"] != b["prompt_tokens"]:
            sys.exit(f"bench: step {n}: prompts have {a['prompt_tokens']} tokens in TRL and {b['prompt_tokens']} in llmrl")
        for what, tolerance in (("rewards", 1e-6), ("advantages", 1e-4)):
            gap = max(abs(x - y) for x, y in zip(a[what], b[what], strict=True))
            if gap > tolerance:
                sys.exit(f"bench: step {n}: {what} differ by {gap:.3g}")


def compare(shape: Shape, steps: int, rounds: int, threads: int, log: Path) -> dict[str, Any]:
    """All rounds of a shape, each with one step more than `steps`: the first warms up."""
    with tempfile.TemporaryDirectory(prefix="llmrl-bench-model-") as folder:
        model = run_side("model", shape, 0, folder, threads, log)["folder"]
        found: dict[str, list[dict[str, Any]]] = {"trl": [], "llmrl": []}
        for n in range(rounds):
            for side in found:
                found[side].append(run_side(side, shape, steps + 1, model, threads, log))
                seconds = [round(s["step_s"], 2) for s in found[side][-1]["steps"]]
                print(f"{shape.name} round {n + 1}: {side:5} s/step {seconds[1:]} (warm-up {seconds[0]})", file=sys.stderr, flush=True)
            check_same(shape, found["trl"][-1], found["llmrl"][-1])
        exact = run_side("exact", shape, 1, model, threads, log)
    summaries = {k: summary(v) for k, v in found.items()}
    return {"shape": asdict(shape), "rounds": found, "exact": exact, "summary": summaries, "ratios": ratios(found)}


def summary(rounds: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over the measured steps of all rounds; counts and shares are of the same steps, meaned; peak memory is the largest."""
    steps = [s for r in rounds for s in r["steps"][1:]]
    out = {k: statistics.median(s[k] for s in steps) for k in ("step_s", "cpu_s", "generate_s", "score_s", "update_s", "rest_s")}
    out |= {k: statistics.fmean(s[k] for s in steps) for k in ("positions", "padding", "attention_padding", "micro_batches")}
    out["generated"] = statistics.fmean(sum(s["lengths"]) for s in steps)
    out["generated_per_s"] = statistics.median(sum(s["lengths"]) / s["generate_s"] for s in steps)
    out["idle_slots"] = 1 - sum(sum(s["lengths"]) for s in steps) / sum(s["decode_slots"] for s in steps)
    return out | {"peak_gb": max(r["peak_gb"] for r in rounds), "workers_gb": max(r["workers_gb"] for r in rounds)}


def ratios(found: dict[str, list[dict[str, Any]]]) -> dict[str, list[float]]:
    """TRL's seconds over llmrl's, one number a round (medians of its measured steps): above 1, llmrl is faster."""
    out = {}
    for key in ("step_s", "cpu_s", "generate_s", "update_s"):
        medians = {k: [statistics.median(s[key] for s in r["steps"][1:]) for r in v] for k, v in found.items()}
        out[key] = [a / b for a, b in zip(medians["trl"], medians["llmrl"], strict=True)]
    return out


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    s, t, o, e = result["shape"], result["summary"]["trl"], result["summary"]["llmrl"], result["exact"]


    def times(key: str) -> str:
        r = sorted(result["ratios"][key])
        return f"**{statistics.median(r):.2f}** ({r[0]:.2f}-{r[-1]:.2f})"

    def exact(key: str) -> list[str]:
        return [f"{e[side][key]:.1e}" for side in ("trl", "llmrl")]

    rows = [
        ("seconds a step", f"{t['step_s']:.2f}", f"{o['step_s']:.2f}", times("step_s")),
        ("- generate", f"{t['generate_s']:.2f}", f"{o['generate_s']:.2f}", times("generate_s")),
        ("- score", f"{t['score_s']:.3f}", f"{o['score_s']:.3f}", ""),
        ("- update: forward, backward, optimizer", f"{t['update_s']:.2f}", f"{o['update_s']:.2f}", times("update_s")),
        ("- rest", f"{t['rest_s']:.2f}", f"{o['rest_s']:.2f}", ""),
        ("CPU seconds a step, main process", f"{t['cpu_s']:.2f}", f"{o['cpu_s']:.2f}", times("cpu_s")),
        ("tokens generated a second", f"{t['generated_per_s']:.0f}", f"{o['generated_per_s']:.0f}", ""),
        ("decoding slots without a token", f"{t['idle_slots']:.1%}", f"{o['idle_slots']:.1%}", ""),
        ("training positions", f"{t['positions']:.0f}", f"{o['positions']:.0f}", f"{t['positions'] / o['positions']:.2f}"),
        ("padding, of these", f"{t['padding']:.1%}", f"{o['padding']:.1%}", ""),
        ("padding inside attention rows", f"{t['attention_padding']:.1%}", f"{o['attention_padding']:.1%}", ""),
        ("peak memory (ru_maxrss), GB", f"{t['peak_gb']:.2f}", f"{o['peak_gb']:.2f} + {o['workers_gb']:.2f} verifiers", ""),
        ("error of log-probs: largest, nats", *exact("logp_max"), ""), ("error of log-probs: mean, nats", *exact("logp_mean"), ""),
        ("relative error of d loss / d hidden", *exact("d_hidden"), ""), ("relative error of d loss / d head", *exact("d_weight"), ""),
    ]  # fmt: skip
    lengths = f"{s['longest']}" if s["even"] else f"{s['shortest']}-{s['longest']}"
    head = f"**{s['name']}**: {s['model']}, {s['dtype']}; {s['prompts']} prompts x {s['group']} completions of {lengths} tokens, "
    head += f"{o['generated']:.0f} a step; TRL {e['versions']['trl']} in micro-batches of {s['micro']}, llmrl of {s['tokens']} tokens."
    lines = [head, "", "| a step | TRL | llmrl | TRL : llmrl, median (min-max of rounds) |", "|---|---|---|---|"]
    return "\n".join(lines + ["| " + " | ".join(r) + " |" for r in rows]) + "\n"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--shape", choices=[*SHAPES, "all"], default="all")
    p.add_argument("--steps", type=int, default=3, help="measured steps a round, after one that warms up")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--out", type=Path, default=Path("runs/bench.json"), help="all numbers; the tables go beside it as .md")
    p.add_argument("--quick", action="store_true", help="the tiny shape, 1 round of 2 steps")
    p.add_argument("--even", action="store_true", help="all completions as long as the longest: no padding to save")
    p.add_argument("--micro", type=int, help="TRL's per_device_train_batch_size")
    p.add_argument("--tokens", type=int, help="llmrl's batch.tokens")
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--task", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.task:
        return run_task(a.task, {"llmrl": run_llmrl})
    if a.quick:
        a.shape, a.steps, a.rounds = "tiny", 2, 1
    a.out.parent.mkdir(parents=True, exist_ok=True)
    log = a.out.with_suffix(".log")
    log.write_text("")
    results = []
    for name in SHAPES if a.shape == "all" else [a.shape]:
        changes = {k: v for k, v in (("micro", a.micro), ("tokens", a.tokens), ("even", a.even)) if v}
        results.append(compare(replace(SHAPES[name], **changes), a.steps, a.rounds, a.threads, log))
    where = {"machine": f"{platform.machine()}, {a.threads} threads", "load average at the end": f"{os.getloadavg()[0]:.1f}"}
    where |= {"date": time.strftime("%Y-%m-%d"), **results[0]["exact"]["versions"]}
    a.out.write_text(json.dumps({"where": where, "rounds": a.rounds, "steps": a.steps, "results": results}))
    text = "\n".join(table(r) for r in results) + "\n" + ", ".join(f"{k} {v}" for k, v in where.items())
    text += f"; {a.rounds} rounds of {a.steps} measured steps.\n"
    a.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
