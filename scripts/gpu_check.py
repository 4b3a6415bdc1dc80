"""What to run where a GPU is at hand; on a CPU it runs the same code on a tiny model, to show that the script itself works.

    python scripts/gpu_check.py [--model PATH] [--dtype bfloat16] [--prompts 8] [--group 8] [--new 128] [--markdown OUT]
                                [--server URL ...] [--colocated] [--rank 16]

Measures, and prints as a table with the device's name: the log-prob error of device and dtype against fp32 on the CPU, the gradient's
error, engine tokens a second, update tokens a second and the share of the device's peak FLOP/s that they are (MFU), peak memory, and the
time and bytes of handing all weights over as files. With --server (running vLLM servers of the same model, see docs/scale.md): seconds of an
update by every route that they have (file, broadcast, adapter and merged adapters), whether the servers' log-probs are then the learner's,
tokens a second, and with --colocated the GPU memory that they give back asleep. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from llmrl import losses
from llmrl.batch import evaluate_terms, global_denominators, pack
from llmrl.hf_engine import HFEngine
from llmrl.learner import Learner, RunFailed
from llmrl.models import load_policy
from llmrl.recipe import Lora, Model, Optim
from llmrl.records import InputError, Request, Sample, Sampling
from llmrl.rules.base import Needs, Term
from llmrl.vllm_engine import vllm
from llmrl.weights import WeightFiles, layers

PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12}
"""Dense bf16 FLOP/s without sparsity, from the vendors' data sheets."""
TERMS = (Term(losses.pg_clip(0.2, 0.2)),)


def accelerator() -> Any:
    from accelerate import Accelerator

    return Accelerator(cpu=not torch.cuda.is_available())


def settle() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def samples_of(policy: Any, args: argparse.Namespace) -> tuple[list[Sample], float]:
    """Prompts of uneven length with `group` completions each, and the seconds that sampling them took (second call: warm)."""
    ids = [i for i in range(policy.model.config.get_text_config().vocab_size) if i not in policy.banned_ids and i not in policy.stop_ids][:400]
    contexts = [tuple((ids * 9)[k : k + 24 + 7 * k]) for k in range(args.prompts)]
    how = Sampling(max_new_tokens=args.new)
    requests = [Request(c, ("gpu_check", k, i), how) for k, c in enumerate(contexts) for i in range(args.group)]
    engine = HFEngine(policy)
    engine.generate(requests[: args.group])
    began = settle()
    done = engine.generate(requests)
    seconds = settle() - began
    made = [Sample(str(n), str(r.seed[1]), list(r.context_ids), c.token_ids, c.logprobs, 0) for n, (r, c) in enumerate(zip(requests, done, strict=True))]
    return made, seconds


def backward(learner: Learner, samples: list[Sample], tokens: int) -> tuple[torch.Tensor, float, int]:
    """(log-probs of all tokens, seconds, input tokens): one forward and backward of a policy-gradient loss."""
    adv = [torch.full((len(s.token_ids),), (-1.0) ** k) for k, s in enumerate(samples)]
    denominators = global_denominators(samples, TERMS, max_new_tokens=1)
    began, seen, found = settle(), 0, {}
    for batch in pack(samples, adv, tokens=tokens):
        b = batch.to(learner.policy.device)
        out = learner.forward(b, Needs())
        learner.backward(evaluate_terms(TERMS, b, out, denominators)[0])
        seen += len(b.ids_P)
        found.update(zip(batch.sample_index, out.logp_T.detach().cpu().split([len(samples[i].token_ids) for i in batch.sample_index]), strict=True))
    return torch.cat([found[i] for i in range(len(samples))]), settle() - began, seen


def free_gb() -> float | None:
    return torch.cuda.mem_get_info()[0] / 1e9 if torch.cuda.is_available() else None


def route_rows(args: argparse.Namespace, device: str, transfer: str, rank: int | None) -> list[tuple[str, str]]:
    """One route to the servers, three updates: the last one's time, the fingerprint, generation, sleep. rank: of LoRA adapters, None = all learn."""
    policy = load_policy(Model(path=args.model, dtype=args.dtype, lora=Lora(rank=rank, alpha=2 * rank) if rank else None), device=device)
    learner = Learner(policy, accelerator())
    what = f"{transfer}, LoRA of rank {rank}" if rank else transfer
    try:
        engine = vllm(servers=args.server, transfer=transfer, colocated=args.colocated and transfer != "broadcast", keep=False)(policy)  # type: ignore[arg-type]
    except InputError as error:
        return [(what, f"not here: {str(error)[:160]}")]
    try:
        ids = [i for i in range(policy.model.config.get_text_config().vocab_size) if i not in policy.banned_ids][5:69]
        for version in range(1, 4):
            began = settle()
            engine.load_weights(version, learner.weights)
            seconds = settle() - began
        gap = max(abs(a - b) for told in engine.fingerprint(ids).values() for a, b in zip(learner.probe(ids), told, strict=True))
        size = sum(p.numel() * p.element_size() for n, p in policy.model.named_parameters() if transfer != "adapter" or ".lora_" in n)
        rows = [(f"update by {what}", f"{seconds:.3f} s, {size / 1e9:.3f} GB to {len(args.server)} servers; largest gap after it {gap:.3g} nats")]
        requests = [Request(tuple(ids[: 24 + k]), ("gpu_check", k, i), Sampling(args.new)) for k in range(args.prompts) for i in range(args.group)]
        began = settle()
        new = sum(len(c.token_ids) for c in engine.generate(requests))
        rows.append((f"vLLM after {what}", f"{new / (settle() - began):,.0f} tokens/s ({len(requests)} completions)"))
        if engine.colocated:
            before, began = free_gb(), settle()
            engine.sleep()
            seconds, asleep = settle() - began, free_gb()
            given = f", {asleep - before:.2f} GB given back" if asleep is not None and before is not None else ""
            began = settle()
            engine.load_weights(4, learner.weights)
            awake = settle() - began
            gap = max(abs(a - b) for told in engine.fingerprint(ids).values() for a, b in zip(learner.probe(ids), told, strict=True))
            rows.append((f"sleep, then {what}", f"asleep in {seconds:.2f} s{given}; awake with new weights in {awake:.2f} s, gap {gap:.3g} nats"))
        return rows
    except RunFailed as error:
        return [(what, f"failed: {error}")]
    finally:
        engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=16384, help="input tokens a micro-batch")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--server", action="append", default=[], help="address of a running vLLM server of the same model")
    parser.add_argument("--colocated", action="store_true", help="the servers are on this GPU, started with --enable-sleep-mode")
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA adapters that are sent")
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine()
    device = "cuda" if on_gpu else "cpu"
    rows: list[tuple[str, str]] = [("device", name), ("torch", torch.__version__), ("model", f"{args.model}, {args.dtype}")]

    policy = load_policy(Model(path=args.model, dtype=args.dtype), device=device)
    n = sum(p.numel() for p in policy.model.parameters())
    learner = Learner(policy, accelerator())
    learner.start(Optim(lr=1e-6))
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    samples, seconds = samples_of(policy, args)
    new = sum(len(s.token_ids) for s in samples)
    rows.append(("HF engine", f"{new / seconds:,.0f} tokens/s ({len(samples)} completions of up to {args.new})"))
    backward(learner, samples, args.tokens)
    learner.update(0.0)
    logp, seconds, seen = backward(learner, samples, args.tokens)
    norm = learner.update(0.0)
    flops = 6 * n * seen / seconds
    peak = next((v for k, v in PEAK.items() if k in name), None)
    rows.append(("forward and backward", f"{seen / seconds:,.0f} input tokens/s, {flops / 1e12:.2f} TFLOP/s" + (f", MFU {flops / peak:.1%}" if peak else "")))
    told = torch.tensor([x for s in samples for x in s.behavior_logp or []])
    rows.append(("learner against engine", f"largest gap {float((logp - told).abs().max()):.3g} nats, mean {float((logp - told).abs().mean()):.3g}"))
    if on_gpu:
        rows.append(("peak memory", f"{torch.cuda.max_memory_allocated() / 1e9:.2f} GB"))

    plain = Learner(load_policy(Model(path=args.model, dtype="float32")), accelerator())
    plain.start(Optim(lr=1e-6))
    if not on_gpu or n < 2e9:
        few = samples[: min(len(samples), 16)]
        want, _, _ = backward(plain, few, args.tokens)
        gap = (logp[: len(want)] - want).abs()
        rows.append(("log-probs against fp32 on the CPU", f"largest {float(gap.max()):.3g} nats, mean {float(gap.mean()):.3g} ({len(few)} completions)"))
        backward(learner, few, args.tokens)
        mine, theirs = learner.update(0.0), plain.update(0.0)
        rows.append(("gradient norm against fp32 on the CPU", f"{mine:.6g} against {theirs:.6g} (all completions: {norm:.6g})"))

    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        files = WeightFiles(folder)
        files.begin(1)
        began = settle()
        paths = [files.write(n, group) for n, group in enumerate(layers(learner.weights()))]
        size = sum(p.stat().st_size for p in paths)
        rows.append(("weights written as files", f"{settle() - began:.2f} s, {size / 1e9:.2f} GB in {len(paths)} files"))
        shutil.rmtree(folder, ignore_errors=True)
        Path(folder).mkdir(exist_ok=True)

    ways = [("adapter", args.rank), ("file", None), ("broadcast", None), ("file", args.rank), ("broadcast", args.rank)]  # the first needs the first weights
    for transfer, rank in ways if args.server else []:
        rows += route_rows(args, device, transfer, rank)

    text = "\n".join(["| what | measured |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)])
    print(text)
    if args.markdown:
        args.markdown.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
