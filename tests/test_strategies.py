"""One recipe under every strategy, over two processes and one (gloo, CPU): the same losses, gradient norms, weights; checkpoints move between them."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.test_ranks import assert_close_rows, free_port, write_inputs

REPO = Path(__file__).parents[1]
DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
PLANS = ["ddp", "fsdp2", *(["zero1", "zero2", "zero3"] if DEEPSPEED else [])]
KINDS = ["full", "lora"]
SCRIPT = '''"""Five steps under each plan x {full, lora}; then runs that stop under one plan and go on under another."""
import shutil, sys
from pathlib import Path

import torch

torch.set_num_threads(1)
from llmrl.config import load_recipe
from llmrl.console import Console
from llmrl.train import train

here, out, plans, moves = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].split(","), sys.argv[4].split(",")
warm = "warm_start={steps=2, examples=6, data={path='%s'}, optim={lr=1e-3, eps=1e-2}}" % (here / "rows.jsonl")
LORA = "model.lora={rank=4, alpha=8}"
KEYS = {"full": ["rule={use='verl_erank', stride=2, kl=0.05}", warm], "lora": ["rule={use='dapo', dynamic_rounds=0, kl=0.05}", LORA, "optim.lr=0.02"]}


def run(folder, plan, kind, *more, resume=False):
    keys = [f"run.dir={folder}", f"learner.strategy={plan}", "steps=5", "batch.epochs=2", "checkpoint={every=1, keep=9}", *KEYS[kind], *more]
    train(load_recipe(here / "r.toml", keys), console=Console(quiet=True), resume=resume)


for plan in filter(None, plans):
    for kind in KEYS:
        run(out / f"{plan}-{kind}", plan, kind)
for move in filter(None, moves):  # FOLDER:PLAN, a run of the other world size cut off after its third step
    folder, plan = move.split(":")
    run(out / folder, plan, folder.rsplit("-", 1)[1].split("_")[0], resume=True)
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
'''


def launch(folder: Path, out: Path, plans: list[str], moves: list[str], world: int) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    env["PYTHONWARNINGS"] = "ignore"
    rendezvous = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    command = [sys.executable, *(rendezvous if world == 2 else []), str(folder / "plans.py"), str(folder), str(out), ",".join(plans), ",".join(moves)]
    with (folder / "log").open("a") as log:
        done = subprocess.run(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, timeout=240, check=False)
    assert done.returncode == 0, (folder / "log").read_text()[-4000:]


def cut(run: Path, step: int, to: Path) -> None:
    """A copy of a run as a kill after `step` would have left it."""
    import shutil

    shutil.copytree(run, to)
    for p in (to / "checkpoints").iterdir():
        if int(p.name[5:]) > step:
            shutil.rmtree(p)
    manifest = json.loads((to / "manifest.json").read_text())
    manifest["recipe"]["run"]["dir"] = str(to)
    (to / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders NAME-KIND: one-, each plan's, and moved ones."""
    folder = tmp_path_factory.mktemp("plans")
    write_inputs(folder)
    (folder / "plans.py").write_text(SCRIPT)
    launch(folder, folder, ["ddp"], [], 1)
    for kind in KINDS:
        (folder / f"ddp-{kind}").rename(folder / f"one-{kind}")
        cut(folder / f"one-{kind}", 3, folder / f"spread-{kind}")
    sharded = PLANS[-2] if DEEPSPEED else "fsdp2"  # zero2
    launch(folder, folder, PLANS, [f"spread-{kind}:{sharded}" for kind in KINDS], 2)
    for kind in KINDS:
        cut(folder / f"{sharded}-{kind}", 3, folder / f"gathered-{kind}")
    launch(folder, folder, [], [f"gathered-{kind}:ddp" for kind in KINDS], 1)
    return folder


def model_of(run: Path) -> dict[str, torch.Tensor]:
    (file,) = (run / "checkpoints" / "step-000005" / "model").glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("plan", [*PLANS, "spread", "gathered"])
def test_every_plan_gives_what_one_process_gives(runs: Path, plan: str, kind: str) -> None:
    one, other = runs / f"one-{kind}", runs / f"{plan}-{kind}"
    rows = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, other)]
    assert len(rows[0]) == len(rows[1]) == 6
    for a, b in zip(*rows, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            if not key.startswith(("time/", "verifier/")) and key not in ("logp_gap/max_nats", "tokens/trained"):
                assert_close_rows(a[key], b[key], f"step {a['step']} {key}")
    x, y = model_of(one), model_of(other)
    assert x.keys() == y.keys() and all(float((x[k] - y[k]).abs().max()) < 1e-5 for k in x)
    assert sum(row["grad/norm"] for row in rows[0][1:]) > 0.1 and any(row["groups/live_share"] < 1 for row in rows[0][1:])


@pytest.mark.parametrize("plan", PLANS)
def test_the_plan_that_was_asked_for_ran(runs: Path, plan: str) -> None:
    facts = json.loads((runs / f"{plan}-full" / "manifest.json").read_text())
    assert facts["processes"] == 2 and facts["learner"]["strategy"] == plan
    share = facts["learner"]["weight_bytes_rank"] / facts["learner"]["weight_bytes_all"]
    assert share == 1 if plan == "ddp" else 0.45 < share < 0.55


def test_lora_saves_adapters_only_and_both_folders_load(runs: Path) -> None:
    full, adapters = model_of(runs / "one-full"), model_of(runs / "one-lora")
    assert all("lora_" in name for name in adapters) and sum(x.numel() for x in adapters.values()) < 0.5 * sum(x.numel() for x in full.values())
    assert (runs / "one-lora" / "checkpoints" / "step-000005" / "model" / "adapter_config.json").is_file()
    assert max(float(x.abs().max()) for name, x in adapters.items() if "lora_B" in name) > 1e-3  # they moved


def test_lora_folders_are_what_they_say(runs: Path, tmp_path: Path) -> None:
    """The adapters loaded by transformers, the exported folder, and the learner's own weights give the same logits."""
    from transformers import AutoModelForCausalLM

    from llmrl.sampling import export_model

    for name in ("one-lora", PLANS[-1] + "-lora"):
        told = export_model(str(runs / name), tmp_path / name, "float32")
        adapters = AutoModelForCausalLM.from_pretrained(runs / name / "checkpoints" / "step-000005" / "model")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        base = AutoModelForCausalLM.from_pretrained(runs / name / "base")
        assert not [n for n, _ in merged.named_parameters() if "lora" in n] and told["parameters"] == sum(p.numel() for p in base.parameters())
        ids = torch.tensor([[1, 5, 14, 6, 17]])
        with torch.no_grad():
            a, b, c = (m(ids).logits for m in (adapters, merged, base))
        assert float((a - b).abs().max()) < 1e-5 and float((a - c).abs().max()) > 1e-3
