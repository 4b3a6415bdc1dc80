"""`llmrl launch --slurm` and `--k8s`: what is written can be read, says the right numbers, and its command is one that the program takes."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from llmrl.cli import app
from llmrl.launch_cluster import check_k8s, check_slurm, k8s_manifest, slurm_script
from llmrl.launch_plan import Asked, make_plan
from llmrl.records import InputError

MATH = Path(__file__).parents[1] / "recipes" / "math_grpo.toml"


def shows(typed: list[str]) -> str:
    """What the command of a script would do."""
    done = CliRunner().invoke(app, ["launch", *typed, "--dry-run"])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout


@pytest.mark.parametrize("nodes", [1, 4])
def test_the_slurm_script(nodes: int, tmp_path: Path) -> None:
    plan = make_plan(Asked(MATH, ("model.lora={rank = 4}",), gpus=8, procs=4, nodes=nodes, vllm=2, overwrite=True), "cluster")
    text = slurm_script(plan)
    assert f"#SBATCH --nodes={nodes}\n" in text and "#SBATCH --gpus-per-node=8\n" in text and "#SBATCH --ntasks-per-node=1\n" in text
    assert "\nset -euo pipefail\n" in text and "mode=--overwrite\n" in text and "runs/math_grpo/manifest.json" in text
    assert any("bash" in line for line in check_slurm(text))
    for name, body in (("scontrol", "printf 'n0\\nn1\\nn2\\nn3\\n'"), ("srun", "printf '%s\\n' \"$@\"")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "job").write_text(text.replace("export PATH=", f"export PATH={tmp_path}:"))
    env = {**os.environ, "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "41234", "SLURM_JOB_NODELIST": "n[0-3]", "SLURM_CPUS_PER_TASK": "64"}
    done = subprocess.run(["bash", str(tmp_path / "job")], env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    options, typed = done.stdout.split("\nllmrl\nlaunch\n")
    assert "--kill-on-bad-exit=1" in options
    shown = shows(typed.splitlines())
    assert shown.count("  trainer\n") == 4 * nodes and shown.count("  vLLM server ") == 2 * nodes
    assert "'model.lora={rank = 4}'" in shown and "--rdzv-id=41234" in shown and "--overwrite" in shown
    if nodes == 4:
        assert "--rdzv-backend=c10d --rdzv-endpoint=n0:21234" in shown and "http://n3:11235" in shown and "--nnodes=4" in shown


def test_a_script_that_bash_cannot_read_is_refused() -> None:
    with pytest.raises(InputError, match="bash -n refuses"):
        check_slurm("if true; then\n")


@pytest.mark.parametrize("nodes", [1, 4])
def test_the_kubernetes_manifest(nodes: int) -> None:
    plan = make_plan(Asked(MATH, ("model.lora={rank = 4}",), gpus=8, procs=4, nodes=nodes, vllm=2, resume=True), "cluster")
    text = k8s_manifest(plan)
    check_k8s(text)
    service, job = yaml.safe_load_all(text)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert (job["spec"]["completions"], job["spec"]["parallelism"], service["spec"]["clusterIP"]) == (nodes, nodes, "None")
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8} and job["metadata"]["name"] == pod["subdomain"] == "llmrl-math-grpo"
    (script,) = container["args"]
    assert "'model.lora={rank = 4}'" in script and "--resume" in script and ("$JOB_COMPLETION_INDEX" in script) == (nodes > 1)
    if nodes > 1:
        assert "--master llmrl-math-grpo-0.llmrl-math-grpo:29500" in script and "llmrl-math-grpo-3.llmrl-math-grpo" in script
    env = {**os.environ, "JOB_COMPLETION_INDEX": "0"}
    printed = subprocess.run(["sh", "-c", script.replace("exec llmrl", "printf '%s\\n'")], env=env, capture_output=True, text=True, check=True)
    shown = shows(printed.stdout.splitlines()[1:])
    assert shown.count("  trainer\n") == 4 * nodes and ("--node-rank=0" in shown) == (nodes > 1)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("name: llmrl-math-grpo\n", "name: llmrl_math\n", r"Service is not valid at metadata.name"),
        ("completions: 1", 'completions: "1"', r"Job is not valid at spec.completions"),
        ("  restartPolicy: Never\n", "  restartPolicy: Always\n", r"restartPolicy"),
        ("workingDir", "workDir", r"workDir"),
        ("mountPath: /dev/shm", "mountPath: dev/shm", r"mountPath"),
        ("      - name: shm  ", "      - name: sham  ", r"do not belong together"),
    ],
)
def test_a_broken_manifest_is_refused(before: str, after: str, said: str) -> None:
    text = k8s_manifest(make_plan(Asked(MATH, gpus=8), "cluster"))
    assert before in text
    with pytest.raises(InputError, match=said):
        check_k8s(text.replace(before, after))


def test_a_script_in_a_file(tmp_path: Path) -> None:
    out = tmp_path / "job.sbatch"
    done = CliRunner().invoke(app, ["launch", str(MATH), "--gpus", "8", "--slurm", "--out", str(out)])
    assert done.exit_code == 0 and done.stdout == "" and f"launch: wrote {out}" in done.stderr and out.read_text().startswith("#!/usr/bin/env bash\n")
    assert ("sbatch --test-only accepts" in done.stderr) == (shutil.which("sbatch") is not None)
