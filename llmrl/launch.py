"""`llmrl launch`: the commands of a plan, shown or run. What is refused: llmrl/launch_plan.py; how processes end: llmrl/launch_processes.py."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path

from llmrl.launch_plan import Asked, Plan
from llmrl.launch_processes import MARK, Command, Server, supervise


def trainer_command(plan: Plan) -> Command:
    """The trainer on this node: under torchrun where there are several processes."""
    asked = plan.asked
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    env = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // plan.procs)), MARK: plan.mark}
    env["CUDA_VISIBLE_DEVICES"] = ",".join(plan.devices[: plan.procs])
    flags = [flag for flag, on in (("--resume", asked.resume), ("--overwrite", asked.overwrite), ("--json", asked.json)) if on]
    train = ["-m", "llmrl.cli", "train", str(asked.recipe), *plan.overrides, *flags]
    if plan.procs * asked.nodes == 1 and not asked.vllm:
        return Command((sys.executable, *train), env, quiet=asked.json)
    run = [f"--nnodes={asked.nodes}", f"--nproc-per-node={plan.procs}", f"--rdzv-id={plan.run_id}"]
    host, _, port = (asked.master or "").rpartition(":")
    if asked.nodes == 1:
        run += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]  # port 0: any that is free
    elif asked.node_rank is None:
        run += ["--rdzv-backend=c10d", f"--rdzv-endpoint={asked.master}"]
    else:
        run += [f"--node-rank={asked.node_rank}", f"--master-addr={host}", f"--master-port={port}"]
    if asked.nodes > 1 or asked.run_id is not None:  # nobody watches: a file a rank
        run += [f"--log-dir={plan.logs / plan.node_name}", "--tee=3"]
    env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = "10"  # seconds torchrun gives its ranks; less than what we give torchrun
    escaped = [word.replace("$", "$$") for word in train]  # torchrun fills in ${rank} and the like, and makes $ of $$
    return Command((sys.executable, "-m", "llmrl.torchrun", *run, *escaped), env, quiet=asked.json)


def servers_of(plan: Plan) -> list[Server]:
    """The servers of this node."""
    asked, model = plan.asked, plan.loaded.recipe.model
    servers = []
    for k in range(asked.vllm):
        port = asked.vllm_port + k
        argv = [asked.vllm_python or sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", plan.model]
        argv += ["--host", "127.0.0.1" if asked.nodes == 1 else "0.0.0.0", "--port", str(port), "--dtype", model.dtype]
        weights, adapters = _route_options(plan)
        argv += [*weights, "--logprobs-mode", "processed_logprobs"]
        argv += [] if plan.devices else ["--no-enable-chunked-prefill"]  # vLLM on CPU dies on a seeded request whose prefill is cut
        limit = _max_model_len(plan)
        argv += ["--max-model-len", str(limit)] if limit else []
        argv += ["--tensor-parallel-size", str(asked.vllm_gpus)] if asked.vllm_gpus > 1 and plan.devices else []
        first = plan.procs + k * asked.vllm_gpus
        env = {"VLLM_SERVER_DEV_MODE": "1", "CUDA_VISIBLE_DEVICES": ",".join(plan.devices[first : first + asked.vllm_gpus]), MARK: plan.mark}
        env |= {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"} if adapters else {}
        log = plan.logs / (f"vllm-{k}.log" if asked.nodes == 1 and asked.run_id is None else f"{plan.node_name}/vllm-{k}.log")
        servers.append(Server(k, f"http://127.0.0.1:{port}", Command((*argv, *shlex.split(asked.vllm_args)), env, log)))
    return servers


def _route_options(plan: Plan) -> tuple[list[str], bool]:
    """(options of a server for the way that weights take: engine.transfer, whether it takes adapters alone)."""
    r = plan.loaded.recipe
    transfer = r.engine.kwargs.get("transfer", "auto")
    backend = "llmrl_broadcast" if transfer == "broadcast" else "llmrl_file"
    argv = ["--weight-transfer-config", json.dumps({"backend": backend}, separators=(",", ":"))]
    adapters = r.model.lora is not None and r.model.lora.quantize is None and transfer in ("auto", "adapter")
    if adapters and r.model.lora is not None:
        argv += ["--enable-lora", "--max-lora-rank", str(next((n for n in _RANKS if n >= r.model.lora.rank), r.model.lora.rank))]
    return argv, adapters


_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for --max-lora-rank."""


def _max_model_len(plan: Plan) -> int | None:
    """Positions that the recipe needs, where it says so for training and evaluation alike; no more than the model has."""
    r = plan.loaded.recipe
    prompts = [data.max_prompt_tokens for data in (r.data, r.eval.data) if data is not None]
    if None in prompts:
        return None
    need = max(p for p in prompts if p is not None) + r.rollout.max_new_tokens
    config = Path(plan.model) / "config.json"
    has = json.loads(config.read_text(encoding="utf-8")).get("max_position_embeddings") if config.is_file() else None
    return min(need, has) if isinstance(has, int) else need


def node_commands(asked: Asked) -> list[str]:
    """What to type on each of several nodes."""
    shared = [*asked.arguments(), "--master", str(asked.master)] + (["--hosts", ",".join(asked.hosts)] if asked.hosts else [])
    if asked.node_rank is None:
        return [shlex.join(["llmrl", "launch", *shared, "--run-id", str(asked.run_id)])] * asked.nodes
    return [shlex.join(["llmrl", "launch", *shared, "--node-rank", str(rank)]) for rank in range(asked.nodes)]


def layout(plan: Plan) -> str:
    """Who runs where: a row a process."""
    asked, rows = plan.asked, [("node", "rank", "local rank", "device", "role")]
    for node in range(asked.nodes):
        for local in range(plan.procs):
            device = f"cuda {plan.devices[local]}" if plan.devices else "cpu"
            rows.append((str(node), str(node * plan.procs + local), str(local), device, "trainer"))
        for k in range(asked.vllm):
            first = plan.procs + k * asked.vllm_gpus
            device = f"cuda {','.join(plan.devices[first : first + asked.vllm_gpus])}" if plan.devices else "cpu"
            rows.append((str(node), "-", "-", device, f"vLLM server {k}, http://{plan.hosts[node]}:{asked.vllm_port + k}"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join("  ".join([*(cell.rjust(w) for cell, w in zip(row[:4], widths, strict=True)), row[4]]) for row in rows)


def dry_run(plan: Plan) -> str:
    """Everything that a launch would do, and what it would set."""
    asked, parts = plan.asked, [layout(plan)]
    if asked.nodes > 1 and asked.node_rank is None:
        parts.append("Which node gets which number is settled when they meet.")
    parts += [f"# {server}; output in {server.command.log}\n{server.command.text()}" for server in servers_of(plan)]
    parts.append(f"# trainer\n{trainer_command(plan).text()}")
    if asked.nodes > 1:
        others = [(k, c) for k, c in enumerate(node_commands(asked)) if k != (asked.node_rank or 0)]
        parts += [f"# on node {k}\n{command}" for k, command in others]
    return "\n\n".join(parts)


# ---------------------------------------------------------------- run


def launch(plan: Plan) -> int:
    """Runs it on this machine; returns the trainer's exit code."""
    asked, servers, trainer = plan.asked, servers_of(plan), trainer_command(plan)
    lines = [*(s.command.text() for s in servers), trainer.text()]
    sys.stderr.write("".join(f"launch: {line}\n" for line in lines))
    if asked.nodes > 1 and asked.node_rank == 0:
        sys.stderr.write("".join(f"launch: on node {k}: {line}\n" for k, line in enumerate(node_commands(asked)) if k))
    every = [f"http://{host}:{asked.vllm_port + k}" for host in plan.hosts for k in range(asked.vllm)] if asked.nodes > 1 else []
    code = supervise(servers, every, trainer, mark=plan.mark, weights=plan.weights, wait_s=asked.vllm_wait)
    if asked.json and code == 0 and not asked.node_rank:
        sys.stdout.write((plan.run_dir / "summary.json").read_text(encoding="utf-8"))
    return code
