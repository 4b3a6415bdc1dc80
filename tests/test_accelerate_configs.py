"""recipes/accelerate/*.yaml: taken by the installed accelerate, and what it tells its processes is the strategy that each file is named after."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from llmrl.config import load_recipe
from llmrl.records import InputError
from llmrl.session import resolve_strategy
from tests.test_cli import TINY

REPO = Path(__file__).parents[1]
FILES = {p.stem: p for p in sorted((REPO / "recipes" / "accelerate").glob("*.yaml"))}
STRATEGIES = {
    "ddp": ("ddp", False), "fsdp2": ("fsdp2", False), "zero1": ("zero1", False), "zero2": ("zero2", False), "zero3": ("zero3", False),
    "zero3_offload": ("zero3", True),
}  # fmt: skip


def environment(name: str, *more: str) -> dict[str, str]:
    """What accelerate's own launcher would start llmrl's processes with. The part that asks for DeepSpeed itself comes after this."""
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    command = ["--config_file", str(FILES[name]), "--num_processes", "2", "--main_process_port", "0", *more, "--no_python", "llmrl", "train", "r.toml"]
    args, defaults, _ = launch._validate_launch_command(launch.launch_command_parser().parse_args(command))
    assert args.num_processes == 2 and args.training_script == "llmrl" and args.mixed_precision == "no"
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        prepared, env = prepare_deepspeed_cmd_env(args)
        assert prepared is None  # torchrun starts the processes: on several nodes too
        return env
    assert args.use_fsdp or args.multi_gpu
    return prepare_multi_gpu_env(args)


def told(name: str, monkeypatch: pytest.MonkeyPatch, *keys: str, launched: dict[str, str] | None = None) -> tuple[str, bool]:
    for key, value in (launched or environment(name)).items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("WORLD_SIZE", "2")
    return resolve_strategy(load_recipe(REPO / "recipes" / "quickstart.toml", keys))


def test_there_is_a_file_for_every_strategy() -> None:
    assert set(FILES) == set(STRATEGIES)
    for name, path in FILES.items():
        text = path.read_text()
        assert f"recipes/accelerate/{name}.yaml --num_processes 8 --no_python llmrl train RECIPE" in text
        assert yaml.safe_load(text)["mixed_precision"] == "no"


@pytest.mark.parametrize("name", STRATEGIES)
def test_accelerate_takes_it_and_llmrl_reads_the_strategy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(name, monkeypatch) == STRATEGIES[name]
    assert "ACCELERATE_USE_FSDP" not in os.environ and "ACCELERATE_USE_DEEPSPEED" not in os.environ  # accelerate's plug-ins stay out of it


@pytest.mark.parametrize("name", [n for n in STRATEGIES if n != "ddp"])
def test_a_recipe_that_asks_for_something_else_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = "zero1" if STRATEGIES[name][0] != "zero1" else "fsdp2"
    with pytest.raises(InputError, match=f"asks for {asked}, accelerate was started for {STRATEGIES[name][0]}"):
        told(name, monkeypatch, f"learner.strategy={asked}")


def test_on_two_nodes_they_are_torchruns_too(monkeypatch: pytest.MonkeyPatch) -> None:
    more = ["--num_machines", "2", "--machine_rank", "1", "--main_process_ip", "127.0.0.1", "--main_process_port", "29765"]
    for name, strategy in STRATEGIES.items():
        assert told(name, monkeypatch, launched=environment(name, *more)) == strategy


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "zero3_offload"])
def test_accelerate_launch_trains_over_two_processes(name: str, tmp_path: Path) -> None:
    """The command of the file's own header, on CPU."""
    if name.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("accelerate's DeepSpeed launcher imports deepspeed, which is not installed")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FILES[name]), "--num_processes", "2", "--main_process_port", "0"]
    command += ["--no_python", sys.executable, "-m", "llmrl.cli", "train", "recipes/quickstart.toml", *TINY, "steps=1", f"run.dir={tmp_path / 'run'}"]
    with (tmp_path / "log").open("w") as log:
        done = subprocess.run(command, env=env, cwd=REPO, stdout=log, stderr=subprocess.STDOUT, timeout=120, check=False)
    said = (tmp_path / "log").read_text()
    assert done.returncode == 0, said[-3000:]
    manifest = yaml.safe_load((tmp_path / "run" / "manifest.json").read_text())
    ran = manifest["learner"]
    assert manifest["processes"] == 2 and (ran["strategy"], ran.get("offload", False)) == STRATEGIES[name] and "2 processes" in said
