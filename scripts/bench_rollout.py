"""Rollout speed, weight transfer and overlap. Three parts; each takes a few minutes and says what it measured in a table.

generate: new tokens a second of the HF engine, of TRL's generation (GRPOTrainer._generate_single_turn, transformers' generate) and, with
    --vllm-python, of the vLLM engine over HTTP. SmolLM2 in bf16, the same prompts, every completion with the same number of new tokens.
    Rounds take turns; each side of a round is a process of its own, which warms up first.
transfer: seconds from "the learner has new weights" to "every server answers with them", and bytes; needs --vllm-python.
overlap: seconds a step at engine.max_staleness 0, 1, 2 on a scripted server whose answers take as long as it is told. SIMULATED: it says
    what the schedule gains, not how fast any server is.

    python scripts/bench_rollout.py                                        # generate (HF, TRL) and overlap
    python scripts/bench_rollout.py --vllm-python ~/vllm/bin/python        # all three; starts a vLLM server of its own, and ends it
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]
from bench import SHAPES  # noqa: E402

SHAPE, GROUP = SHAPES["smollm2"], 8
"""Prompts and model of `make bench`; samples a prompt."""


# ---------------------------------------------------------------- one side of a round, in a process of its own


def contexts_of(chat: Any, batch: int) -> list[list[int]]:
    """A context for each of `batch` completions, GROUP of them a prompt."""
    prompts = [chat.prompt_ids([{"role": "user", "content": SHAPE.question(p)}]) for p in range(batch // GROUP)]
    return [prompts[i // GROUP] for i in range(batch)]


def endless(folder: str) -> Any:
    """The policy, its end tokens being among those that are never sampled: every completion ends by length."""
    from llmrl.models import load_policy
    from llmrl.recipe import Model

    policy = load_policy(Model(path=folder, dtype=SHAPE.dtype))  # type: ignore[arg-type]
    return replace(policy, stop_ids=frozenset(), banned_ids=tuple(sorted({*policy.banned_ids, *policy.stop_ids})))


def ours(engine: Any, chat: Any, new: int) -> Callable[[int, int], int]:
    """(batch, seed) -> tokens made, through an engine of llmrl."""
    from llmrl.records import Request, Sampling

    def make(batch: int, seed: int) -> int:
        asked = [Request(tuple(c), (seed, i), Sampling(new)) for i, c in enumerate(contexts_of(chat, batch))]
        done = engine.generate(asked)
        if any(len(c.token_ids) != new for c in done):
            sys.exit(f"bench: completions of {sorted({len(c.token_ids) for c in done})} tokens instead of {new}")
        return batch * new

    return make


def side_hf(folder: str, new: int, task: dict[str, Any]) -> Callable[[int, int], int]:
    from llmrl.hf_engine import HFEngine

    policy = endless(folder)
    return ours(HFEngine(policy), policy.chat, new)


def side_vllm(folder: str, new: int, task: dict[str, Any]) -> Callable[[int, int], int]:
    from llmrl.vllm_engine import vllm

    policy = endless(folder)
    return ours(vllm(servers=[task["server"]], folder=task["work"])(policy), policy.chat, new)


def side_trl(folder: str, new: int, task: dict[str, Any]) -> Callable[[int, int], int]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    from llmrl.chat import Chat

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    config = GRPOConfig(
        per_device_train_batch_size=GROUP, num_generations=GROUP, max_completion_length=new, generation_kwargs={"min_new_tokens": new}, use_cpu=True,
        bf16=False, fp16=False, gradient_checkpointing=False, output_dir=task["work"], report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, SHAPE.dtype)), reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config, train_dataset=Dataset.from_list([{"prompt": "x"}]), processing_class=tokenizer,
    )  # fmt: skip
    chat = Chat(tokenizer)

    def make(batch: int, seed: int) -> int:
        torch.manual_seed(seed)
        ids, _ = trainer._generate_single_turn(contexts_of(chat, batch), None, {}, GROUP)
        if any(len(x) != new for x in ids):
            sys.exit(f"bench: TRL made completions of {sorted({len(x) for x in ids})} tokens instead of {new}")
        return batch * new

    return make


def run_child(text: str) -> None:
    import torch

    task = json.loads(text)
    torch.set_num_threads(task["threads"])
    make = {"hf": side_hf, "trl": side_trl, "vllm": side_vllm}[task["side"]](task["model"], task["new"], task)
    make(GROUP, 0)  # warm-up
    rates = {}
    for batch in task["batches"]:
        began = time.perf_counter()
        tokens = make(batch, 1 + task["round"])
        rates[batch] = tokens / (time.perf_counter() - began)
    Path(task["result"]).write_text(json.dumps(rates))
    os._exit(0)  # engines have threads of their own; what they hold ends with the process


# ---------------------------------------------------------------- the parts


def child(side: str, model: str, a: argparse.Namespace, n: int, server: str | None) -> dict[int, float]:
    with tempfile.TemporaryDirectory(prefix="llmrl-bench-") as work:
        result = Path(work) / "result.json"
        task = {"side": side, "model": model, "new": a.new, "threads": a.threads, "batches": a.batches, "round": n, "work": work, "server": server}
        env = {**os.environ, "OMP_NUM_THREADS": str(a.threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        env |= {"ACCELERATE_USE_CPU": "true", "MALLOC_MMAP_THRESHOLD_": str(2**31 - 1), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}  # as bench.py does
        command = [sys.executable, str(HERE), "--child", json.dumps({**task, "result": str(result)})]
        with a.log.open("ab") as out:
            done = subprocess.run(command, stdout=out, stderr=out, env=env, check=False)
        if done.returncode or not result.is_file():
            sys.exit(f"bench: {side} ended with code {done.returncode}; the end of {a.log}:\n{a.log.read_text(errors='replace')[-2000:]}")
        return {int(batch): rate for batch, rate in json.loads(result.read_text()).items()}


def generate(a: argparse.Namespace, model: str, server: str | None) -> dict[str, Any]:
    found: dict[str, list[dict[int, float]]] = {side: [] for side in ("trl", "hf", *(("vllm",) if server else ()))}
    for n in range(a.rounds):
        for side, rounds in found.items():
            rounds.append(child(side, model, a, n, server))
            print(f"generate, round {n + 1}: {side:4} {({b: round(r) for b, r in rounds[-1].items()})} tokens/s", file=sys.stderr, flush=True)
    print(f"\n| new tokens a second, {a.new} a completion | " + " | ".join(f"batch {b}" for b in a.batches) + " |\n|---|" + "---:|" * len(a.batches))
    names = {"trl": "TRL (transformers' generate)", "hf": "HF engine", "vllm": "vLLM engine, one server, HTTP"}
    for side, rounds in found.items():
        cells = [middle([r[b] for r in rounds], ".0f") for b in a.batches]
        print(f"| {names[side]} | " + " | ".join(cells) + " |")
    return dict(found)


def middle(values: list[float], form: str) -> str:
    """Median (least-largest)."""
    return f"**{statistics.median(values):{form}}** ({min(values):{form}}-{max(values):{form}})"


def transfer(a: argparse.Namespace, model: str, server: str) -> dict[str, Any]:
    """Through VLLMEngine.load_weights, then one look at the server's log-probs. The broadcast writes no files beside it (keep = false)."""
    from llmrl.vllm_engine import vllm

    policy = endless(model)
    ids = contexts_of(policy.chat, GROUP)[0]
    size = sum(p.numel() * p.element_size() for p in policy.model.parameters())
    found: dict[str, list[float]] = {}
    for route in a.transfer:
        with tempfile.TemporaryDirectory(prefix="llmrl-bench-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
            engine = vllm(servers=[server], folder=folder, transfer=route, keep=False)(policy)
            try:
                seconds = []
                for version in range(1, a.rounds + 2):
                    began = time.perf_counter()
                    engine.load_weights(version, lambda: ((name, p.detach()) for name, p in policy.model.named_parameters()))
                    engine.fingerprint(ids)
                    seconds.append(time.perf_counter() - began)
                    print(f"transfer, {route}: {seconds[-1]:.2f} s", file=sys.stderr, flush=True)
                found[route] = seconds[1:]
            finally:
                engine.close()
    print(f"\n| route, {size / 1e6:.0f} MB of weights | seconds until proven | MB/s |\n|---|---:|---:|")
    for route, seconds in found.items():
        print(f"| {route} | {middle(seconds, '.2f')} | {size / 1e6 / statistics.median(seconds):.0f} |")
    return {"bytes": size, "seconds": found}


TURNS = '''"""Rollouts of a few requests one after the other."""
from dataclasses import replace

from llmrl.compose import with_mismatch
from llmrl.records import Group
from llmrl.rollout import make_sample
from llmrl.rules.grpo import grpo


def turns(n: int = 1):
    async def collect(prompts, io):
        contexts = [io.chat.prompt_ids(p.messages) for p in prompts]
        groups = [Group(p, []) for p in prompts]
        for part in range(n):
            mine = range(part * io.group // n, (part + 1) * io.group // n)
            jobs = [(g, i) for g in range(len(prompts)) for i in mine]
            done = io.sample([contexts[g] for g, _ in jobs], [(prompts[g].visit_id, i) for g, i in jobs])
            verdicts = await io.verify([(prompts[g], c.text) for (g, _), c in zip(jobs, done)])
            for (g, i), c, v in zip(jobs, done, verdicts):
                groups[g].samples.append(make_sample(prompts[g], i, contexts[g], c, v))
        return groups

    return replace(with_mismatch(grpo(), "token_truncate"), collect=collect)


def judge():
    from llmrl.records import Verdict

    return lambda prompt, response: Verdict(float(len(response) % 2))
'''


@contextlib.contextmanager
def scripted(work: Path) -> Iterator[Any]:
    """A scripted server of a model of 3.2M parameters, and the recipe's files beside it."""
    from tests.builders import tiny_policy
    from tests.vllm_server import Scripted

    policy = tiny_policy(hidden=256, layers=4, heads=4, kv_heads=2, ffn=684)
    policy.model.config._attn_implementation = "sdpa"
    policy.model.save_pretrained(work / "model")
    policy.chat.tokenizer.save_pretrained(work / "model")
    (work / "turns.py").write_text(TURNS)
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(10, 40) for b in range(10, 40)]
    (work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    server = Scripted(work / "model").start()
    try:
        yield server.wait()
    finally:
        server.kill()


def overlapped(server: Any, work: Path, steps: int, k: int, turns: int, update_s: float, latency_s: float) -> list[dict[str, float]]:
    """Rows of metrics of the steps but the first 3. The update sleeps up to update_s; a turn takes latency_s beyond what the server computes."""
    from llmrl.config import load_recipe
    from llmrl.session import open_session
    from llmrl.step import run_step

    new = 16
    server.control(clear=True, restarted=True, latency_s=latency_s / new)
    (work / "r.toml").write_text(f"""steps = {steps}
run.dir = {str(work / "run")!r}
model = {{ path = {str(work / "model")!r} }}
data = {{ path = "./rows.jsonl", holdout = 8 }}
rollout = {{ prompts = 4, group = 8, max_new_tokens = {new} }}
engine = {{ use = "vllm", servers = ["{server.url}"], max_staleness = {k} }}
rule = {{ use = "./turns.py:turns", n = {turns} }}
verifier = {{ use = "./turns.py:judge" }}
scoring = {{ workers = 1 }}
""")
    session = open_session(load_recipe(work / "r.toml"))
    update = session.learner.update

    def slow(lr: float) -> float:
        time.sleep(update_s)
        return update(lr)

    session.learner.update = slow  # type: ignore[method-assign]
    try:
        session.learner.start(session.recipe.optim)
        rows = [run_step(session, step, ahead=min(k, steps - step))[2] for step in range(1, steps + 1)]
    finally:
        session.close()
    return rows[3 : len(rows) - k or None]  # type: ignore[return-value]


def overlap(a: argparse.Namespace) -> dict[str, Any]:
    """Update and generation both are mostly sleep, so that server and learner do not compete for this machine's cores."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="llmrl-bench-") as folder, scripted(Path(folder)) as server:
        work = Path(folder)
        for turns in (1, 4):
            plain = overlapped(server, work, 6, 0, turns, a.update_s, 0.0)
            update, busy = (statistics.median(r[f"time/{name}_s"] for r in plain) for name in ("update", "generate"))
            for ratio in (0.5, 1.0, 2.0):
                cells = {}
                for k in (0, 1, 2):
                    rows = overlapped(server, work, a.overlap_steps + 3 + k, k, turns, a.update_s, max(0.0, ratio * update - busy) / turns)
                    cells[k] = {name: [r[name] for r in rows] for name in ("time/step_s", "time/generate_s", "time/update_s", "samples/staleness_updates")}
                    print(f"overlap, {turns} turns, x{ratio}, k={k}: {statistics.median(cells[k]['time/step_s']):.2f} s", file=sys.stderr, flush=True)
                found[f"{turns} turns, generation {ratio} x update"] = cells
    print(f"\nSIMULATED: scripted server, an update takes {a.update_s:g} s (sleep) and its computation; requests of a turn are answered together.\n")
    print("| rollouts | k = 0: s a step | k = 1 | k = 2 | gain of 1 | gain of 2 | mean age at k = 2, updates |\n|---|---:|---:|---:|---:|---:|---:|")
    for name, cells in found.items():
        s = {k: statistics.median(c["time/step_s"]) for k, c in cells.items()}
        age = statistics.fmean(cells[2]["samples/staleness_updates"])
        print(f"| {name} | {s[0]:.2f} | {s[1]:.2f} | {s[2]:.2f} | {s[0] / s[1]:.2f} | {s[0] / s[2]:.2f} | {age:.2f} |")
    return found


@contextlib.contextmanager
def vllm_server(a: argparse.Namespace, model: str) -> Iterator[str | None]:
    """The address of a vLLM server of our own; None without --vllm-python."""
    if a.vllm_python is None:
        yield None
        return
    from tests.vllm_server import Real

    os.environ["LLMRL_VLLM_PYTHON"] = str(a.vllm_python.absolute())
    server = Real(model, a.log.absolute(), dtype=SHAPE.dtype)
    try:
        began = time.perf_counter()
        server.start().wait()
        print(f"vLLM is up after {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        yield server.url
    finally:
        server.kill()


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--parts", nargs="+", choices=["generate", "transfer", "overlap"], help="default: all that can be had")
    p.add_argument("--vllm-python", type=Path, help="python of an environment with vLLM (make vllm-env)")
    p.add_argument("--batches", type=int, nargs="+", default=[16, 64])
    p.add_argument("--new", type=int, default=64, help="new tokens a completion")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--transfer", nargs="+", default=["file", "broadcast"], choices=["file", "broadcast"], help="routes of the weights")
    p.add_argument("--update-s", type=float, default=0.6, help="overlap: what an update sleeps")
    p.add_argument("--overlap-steps", type=int, default=8, help="overlap: measured steps")
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--out", type=Path, default=Path("runs/bench_rollout.json"))
    p.add_argument("--child", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.child:
        return run_child(a.child)
    if any(b % GROUP for b in a.batches):
        p.error(f"--batches: {GROUP} completions a prompt")
    parts = a.parts or ["generate", "overlap", *(["transfer"] if a.vllm_python else [])]
    if "transfer" in parts and a.vllm_python is None:
        p.error("--parts transfer needs --vllm-python")
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.log = a.out.with_suffix(".log")
    a.log.write_text("")
    from llmrl.models import find_smollm2, plain_folder

    results: dict[str, Any] = {}
    began = time.perf_counter()
    if {"generate", "transfer"} & set(parts):
        model = plain_folder(str(find_smollm2()))
        with vllm_server(a, model) as server:
            for part, run in (("generate", generate), ("transfer", transfer)):
                if part in parts:
                    results[part] = run(a, model, server)  # type: ignore[arg-type]
    if "overlap" in parts:
        results["overlap"] = overlap(a)
    where = f"{platform.machine()}, {a.threads} threads, load average at the end {os.getloadavg()[0]:.1f}, {time.strftime('%Y-%m-%d')}"
    print(f"\n{where}; {a.rounds} rounds; {time.perf_counter() - began:.0f} s in all")
    a.out.write_text(json.dumps({"where": where, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
