"""`llmrl launch`: what it would run, what it refuses, what it runs, and that nothing of it is left, however it ends."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
import zlib
from pathlib import Path

import psutil
import pytest
import torch
from torch.distributed.elastic.utils import macros

from llmrl.config import load_recipe
from llmrl.console import Console
from llmrl.launch import dry_run, launch, node_commands, servers_of, trainer_command
from llmrl.launch_plan import Asked, make_plan
from llmrl.launch_processes import MARK, Command, Server, healthy, supervise
from llmrl.records import InputError
from llmrl.train import train
from llmrl.weights import WeightFiles, default_folder
from tests.test_cli import TINY
from tests.test_ranks import assert_close_rows, free_port, write_inputs

REPO = Path(__file__).parents[1]
QUICK, MATH = REPO / "recipes" / "quickstart.toml", REPO / "recipes" / "math_grpo.toml"
FAKE = '''#!{python}
"""Stands in for the interpreter of vLLM's environment. FAKE_VLLM: ok, hang, die, once (dies soon after it is ready), bare, alone."""
import http.server, json, os, signal, subprocess, sys, threading, time

mode = os.environ.get("FAKE_VLLM", "ok")
if sys.argv[1] == "-c":
    print(json.dumps([mode != "bare", mode != "alone"]))
    sys.exit()
port = int(sys.argv[sys.argv.index("--port") + 1])
print("started with", sys.argv[2:], "on GPU", os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
if mode == "die":
    print("a first line\\nValueError: no such model", flush=True)
    sys.exit(3)
subprocess.Popen(["sleep", "1000"])  # its engine process: same group
if mode == "hang":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if mode == "hang" and self.path == "/health":
            time.sleep(1000)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(dict(data=[dict(id="fake", max_model_len=64)])).encode())
    def log_message(self, *_):
        pass

if mode == "once":
    threading.Timer(0.6, lambda: os._exit(9)).start()
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
'''


@pytest.fixture
def fake(tmp_path: Path) -> str:
    path = tmp_path / "fake_python"
    path.write_text(FAKE.replace("{python}", sys.executable))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.fixture
def served(tmp_path: Path) -> Path:
    """A folder that a server could be told to load; no test loads it."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"max_position_embeddings": 4000}')
    return tmp_path / "model"


def marked(run_id: str) -> list[psutil.Process]:
    """The processes of a launch that are there, by their mark: RUN_ID.SOMETHING."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK, "").split(".")[0] == run_id:
                found.append(process)
    return found


def none_left(run_id: str, within_s: float = 10.0) -> bool:
    deadline = time.monotonic() + within_s
    while marked(run_id) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not marked(run_id)


# ---------------------------------------------------------------- what it would run


def test_two_processes_on_cpu() -> None:
    plan = make_plan(Asked(QUICK, ("optim.lr=1e-4",), gpus=0, procs=2, resume=True), "show")
    text = dry_run(plan)
    rows = ["node  rank  local rank  device  role", "   0     0           0     cpu  trainer", "   0     1           1     cpu  trainer"]
    assert text.splitlines()[:3] == rows
    command = trainer_command(plan)
    assert command.argv[:4] == (sys.executable, "-m", "llmrl.torchrun", "--nnodes=1") and "--nproc-per-node=2" in command.argv
    assert command.argv[-6:] == ("-m", "llmrl.cli", "train", str(QUICK), "optim.lr=1e-4", "--resume")
    assert command.env["CUDA_VISIBLE_DEVICES"] == "" and "CUDA_VISIBLE_DEVICES=''" in text and plan.mark in text


def test_threads_are_the_cores_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(10)), raising=False)
    threads = {n: trainer_command(make_plan(Asked(QUICK, gpus=0, procs=n), "show")).env["OMP_NUM_THREADS"] for n in (1, 2, 4, 16)}
    assert threads == {1: "10", 2: "5", 4: "2", 16: "1"}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert trainer_command(make_plan(Asked(QUICK, gpus=0, procs=2), "show")).env["OMP_NUM_THREADS"] == "3"


def test_torchruns_macros_leave_overrides_alone() -> None:
    override = 'rollout.stop=["$$", "${local_rank}", "$x"]'
    argv = trainer_command(make_plan(Asked(QUICK, (override,), gpus=0, procs=2), "show")).argv
    assert macros.substitute(list(argv), "0")[-1] == override


def test_one_process_needs_no_torchrun() -> None:
    assert trainer_command(make_plan(Asked(QUICK, gpus=0), "show")).argv[1:] == ("-m", "llmrl.cli", "train", str(QUICK))


def test_gpus_go_to_trainers_first_and_then_to_servers() -> None:
    plan = make_plan(Asked(MATH, gpus=8, procs=4, vllm=2, vllm_gpus=2, vllm_python="/v/python", vllm_args="--seed 1"), "show")
    text = dry_run(plan)
    assert "   0     3           3    cuda 3  trainer\n   0     -           -  cuda 4,5  vLLM server 0, http://127.0.0.1:8000" in text
    assert trainer_command(plan).env["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"
    assert 'engine.servers=["http://127.0.0.1:8000", "http://127.0.0.1:8001"]' in trainer_command(plan).argv
    assert plan.loaded.recipe.engine.use == "vllm" and plan.weights == default_folder()
    first, second = servers_of(plan)
    assert second.command.env == {"VLLM_SERVER_DEV_MODE": "1", "CUDA_VISIBLE_DEVICES": "6,7", MARK: plan.mark}
    said = " ".join(first.command.argv)
    assert said.startswith("/v/python -m vllm.entrypoints.openai.api_server --model Qwen/Qwen2.5-7B --host 127.0.0.1 --port 8000 --dtype bfloat16")
    assert '--weight-transfer-config {"backend":"llmrl_file"} --logprobs-mode processed_logprobs' in said
    assert said.endswith("--tensor-parallel-size 2 --seed 1") and "--max-model-len" not in said  # evaluation prompts have no limit in this recipe
    assert first.command.log == Path("runs/math_grpo.logs/vllm-0.log") and "--port 8001" in text


def test_servers_are_started_for_the_way_that_weights_take() -> None:
    def first(*keys: str) -> tuple[str, dict[str, str]]:
        command = servers_of(make_plan(Asked(MATH, keys, gpus=2, vllm=1), "show"))[0].command
        return " ".join(command.argv), command.env

    lora = "model.lora={rank=24}"
    said, env = first(lora)
    assert "--enable-lora --max-lora-rank 32" in said and '"llmrl_file"' in said and env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"
    for keys, backend in (((), "llmrl_file"), (("engine.transfer=broadcast",), "llmrl_broadcast"), ((lora, "engine.transfer=broadcast"), "llmrl_broadcast"),
                          (("model.lora={quantize='nf4'}",), "llmrl_file")):  # fmt: skip
        said, env = first(*keys)
        assert f'"{backend}"' in said and "--enable-lora" not in said and "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in env


def test_the_recipes_own_limits_and_engine_keys_are_kept(served: Path) -> None:
    keys = ("eval.data=", "data.holdout=4", f"model.path={served}", "engine.folder=/tmp/w", "engine.in_flight=7", "rollout.max_new_tokens=512")
    plan = make_plan(Asked(MATH, keys, gpus=2, vllm=1), "show")
    assert "--max-model-len 1536" in " ".join(servers_of(plan)[0].command.argv)
    assert plan.loaded.recipe.engine.kwargs == {"folder": "/tmp/w", "in_flight": 7, "servers": ["http://127.0.0.1:8000"]} and plan.weights == Path("/tmp/w")
    longer = make_plan(Asked(MATH, (*keys, "rollout.max_new_tokens=4096"), gpus=2, vllm=1), "show")
    assert "--max-model-len 4000" in " ".join(servers_of(longer)[0].command.argv)  # what the model has


def test_several_nodes() -> None:
    asked = Asked(MATH, gpus=4, procs=2, nodes=2, node_rank=1, master="10.0.0.1:29500", vllm=1, vllm_gpus=2, hosts=("a", "b"))
    plan = make_plan(asked, "show")
    text = dry_run(plan)
    assert "   1     3           1    cuda 1  trainer\n   1     -           -  cuda 2,3  vLLM server 0, http://b:8000" in text
    argv = trainer_command(plan).argv
    assert {"--nnodes=2", "--nproc-per-node=2", "--node-rank=1", "--master-addr=10.0.0.1", "--master-port=29500", "--tee=3"} <= set(argv)
    assert 'engine.servers=["http://a:8000", "http://b:8000"]' in argv and f"engine.folder={json.dumps(str(Path('runs/math_grpo.weights').absolute()))}" in argv
    assert "# on node 0\nllmrl launch" in text and text.rstrip().endswith("--master 10.0.0.1:29500 --hosts a,b --node-rank 0")
    met = make_plan(Asked(MATH, gpus=8, nodes=4, master="h:1234", run_id="job-7"), "show")
    assert {"--rdzv-backend=c10d", "--rdzv-endpoint=h:1234", "--rdzv-id=job-7"} <= set(trainer_command(met).argv)
    assert node_commands(met.asked)[3].endswith("--gpus 8 --nodes 4 --master h:1234 --run-id job-7")


# ---------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"overrides": ("rule.hihg=1",)}, r'unknown key "hihg"'),
        ({"gpus": 64}, r"--gpus 64: this machine has \d+"),
        ({"procs": 3}, r"32 prompts a step cannot be shared evenly by 3 trainer processes; rollout.prompts=30 or 33 can, or take --procs 2"),
        ({"nodes": 2}, r"--nodes 2 needs --master HOST:PORT"),
        ({"nodes": 2, "master": "h:1"}, r"needs --node-rank R"),
        ({"nodes": 2, "node_rank": 2, "master": "h:1"}, r"--node-rank 2: with --nodes 2 it is 0 to 1"),
        ({"master": "host"}, r"expected HOST:PORT"),
        ({"run_id": "a b"}, r"letters, digits and dashes"),
        ({"vllm": 1}, r'"tiny" is made in the trainer\'s memory.*llmrl sft'),
    ],
)
def test_refusals(options: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        make_plan(Asked(QUICK, **{"gpus": 0, **options}), "run")


def test_refusals_about_servers(fake: str, served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = (f"model.path={served}", "model.tiny=", "warm_start=", f"run.dir={tmp_path / 'run'}")

    def refuse(said: str, **options) -> None:
        with pytest.raises(InputError, match=said):
            make_plan(Asked(QUICK, keys, **{"gpus": 0, "vllm": 1, "vllm_port": free_port(), "vllm_python": fake, **options}), "run")

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        refuse("port .* is in use", vllm_port=taken.getsockname()[1])
    refuse(r"--vllm-python .*vllm is not installed there", vllm_python=sys.executable)
    refuse(r"it does not run", vllm_python="/no/such/python")
    refuse(r"it is no Python", vllm_python="/bin/echo")
    refuse(r"needs --hosts", nodes=2, node_rank=0, master=f"127.0.0.1:{free_port()}")
    with pytest.raises(InputError, match="2 vLLM servers of 4 take 8 of --gpus 8, and the trainer needs one"):
        make_plan(Asked(QUICK, keys, gpus=8, vllm=2, vllm_gpus=4), "show")
    with pytest.raises(InputError, match="--procs 7: one process a GPU, and 2 vLLM servers of 1 take 2 of --gpus 8: 6 are left"):
        make_plan(Asked(QUICK, keys, gpus=8, vllm=2, procs=7), "show")
    with pytest.raises(InputError, match="how many GPUs a node has"):
        make_plan(Asked(QUICK), "cluster")
    for mode, said in (("bare", "vllm is not installed there"), ("alone", "llmrl is not installed beside vllm")):
        monkeypatch.setenv("FAKE_VLLM", mode)
        refuse(said)
    monkeypatch.setenv("FAKE_VLLM", "ok")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").touch()
    refuse("already holds a run; continue it with --resume")


# ---------------------------------------------------------------- servers


def server(fake: str, tmp_path: Path, number: int = 0) -> Server:
    port = free_port()
    argv = (fake, "-m", "vllm.entrypoints.openai.api_server", "--port", str(port))
    return Server(number, f"http://127.0.0.1:{port}", Command(argv, {"CUDA_VISIBLE_DEVICES": ""}, tmp_path / "logs" / f"vllm-{number}.log"))


def run(servers: list[Server], *trainer: str, remote: tuple[str, ...] = (), wait_s: float = 20.0) -> int:
    command = Command(trainer or (sys.executable, "-c", "pass"), {})
    code = supervise(servers, remote, command, mark="test-launch.1", weights=None, wait_s=wait_s, grace_s=1.0)
    assert none_left("test-launch", 0.0) and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    return code


def test_servers_come_first_and_end_last_and_the_exit_code_is_the_trainers(fake: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    two = [server(fake, tmp_path, k) for k in (0, 1)]
    ask = "import sys, urllib.request as u; [u.urlopen(a + '/v1/models') for a in sys.argv[1:]]; sys.exit(7)"
    code = run(two, sys.executable, "-c", ask, *(s.url for s in two), remote=(two[0].url,))
    said = capfd.readouterr().err
    assert code == 7 and "3 of 3 vLLM servers ready" in said and "the trainer ended with exit code 7" in said
    assert not any(healthy(s.url) for s in two)
    log = (tmp_path / "logs" / "vllm-1.log").read_text()
    assert log.startswith("==== ") and "started with ['vllm.entrypoints" in log


def test_a_server_that_dies_while_it_starts_is_shown(fake: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_VLLM", "die")
    assert run([server(fake, tmp_path)], sys.executable, "-c", "print('never')") == 1
    said = capfd.readouterr()
    assert re.search(r"vLLM server 0 .* ended with exit code 3 while it started; the end of .*vllm-0\.log:\n.*\n    ValueError: no such model", said.err, re.S)
    assert "never" not in said.out


def test_a_server_that_never_answers_meets_the_deadline(fake: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_VLLM", "hang")  # it ignores SIGTERM too
    began = time.monotonic()
    assert run([server(fake, tmp_path)], wait_s=2.0) == 1
    assert 2 < time.monotonic() - began < 8
    assert "not ready within --vllm-wait = 2 s: vLLM server 0" in capfd.readouterr().err


def test_a_server_that_dies_mid_run_is_started_again_three_times(fake: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("FAKE_VLLM", "once")
    assert run([server(fake, tmp_path)], "sleep", "5") == 0
    said = capfd.readouterr().err
    assert [said.count(f"started again ({k} of 3)") for k in (1, 2, 3)] == [1, 1, 1] and "for the 4th time and stays down" in said
    assert (tmp_path / "logs" / "vllm-0.log").read_text().count("started with") == 4


def test_what_left_the_group_is_found_too() -> None:
    """As the ranks of a torchrun that was killed: another session, no parent."""
    script = "import subprocess, os; subprocess.Popen(['sleep', '1000'], start_new_session=True); os.kill(os.getpid(), 9)"
    assert run([], sys.executable, "-c", script) == 137


LAUNCHER = '''"""A launch with a fake server and a torchrun of two ranks, each in a session of its own."""
import signal, socket, sys, zlib
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it, and hands that down
from llmrl.launch_processes import Command, Server, supervise
fake, port, here = sys.argv[1], sys.argv[2], Path(sys.argv[3])
argv = (fake, "-m", "vllm.entrypoints.openai.api_server", "--port", port)
server = Server(0, f"http://127.0.0.1:{port}", Command(argv, {"CUDA_VISIBLE_DEVICES": ""}, here / "vllm.log"))
run = "-m llmrl.torchrun --nproc-per-node=2 --rdzv-backend=c10d --rdzv-endpoint=127.0.0.1:0 --local-addr=127.0.0.1 --no-python".split()
weights = f"{here}/w/run-{zlib.crc32(socket.gethostname().encode()):08x}-$$$$-{0:08x}"
trainer = Command((sys.executable, *run, "sh", "-c", f"mkdir {weights}; touch {here}/up-$RANK; sleep 1000; true"), {"OMP_NUM_THREADS": "1"})
sys.exit(supervise([server], [], trainer, mark=f"test-{port}.1", weights=here / "w", wait_s=30))
'''


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_nothing_outlives_the_launch(number: signal.Signals, fake: str, tmp_path: Path) -> None:
    port = str(free_port())
    (tmp_path / "w" / "run-another").mkdir(parents=True)
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    launcher = subprocess.Popen([sys.executable, str(tmp_path / "launcher.py"), fake, port, str(tmp_path)], env={**os.environ, "PYTHONPATH": str(REPO)})
    try:
        deadline = time.monotonic() + 90
        while (len(list(tmp_path.glob("up-*"))) < 2 or len(marked(f"test-{port}")) < 7) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(marked(f"test-{port}")) >= 7  # server, its child, torchrun, two ranks and their children
        launcher.send_signal(number)
        assert launcher.wait(20) == {signal.SIGTERM: 143, signal.SIGINT: -2, signal.SIGKILL: -9}[number]  # -2: KeyboardInterrupt, uncaught in this script
        assert none_left(f"test-{port}")
        watchdogs = [p for p in psutil.process_iter(["cmdline"]) if f"test-{port}.1" in (p.info["cmdline"] or [])]
        psutil.wait_procs(watchdogs, timeout=10)
        assert not any(p.is_running() for p in watchdogs)
        left = {p.name for p in (tmp_path / "w").iterdir()}  # of a killed launch the next run's trainer deletes them
        assert left == {"run-another"} if number != signal.SIGKILL else len(left) == 3
    finally:
        launcher.kill()
        launcher.wait()


# ---------------------------------------------------------------- the command itself


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(folder of one process, folder of two, folder with what the launch said)"""
    folder = tmp_path_factory.mktemp("launch")
    write_inputs(folder)
    command = [sys.executable, "-m", "llmrl.cli", "launch", str(folder / "r.toml"), f"run.dir={folder / 'two'}", "--gpus", "0", "--procs", "2", "--json"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        launched = subprocess.Popen(command, cwd=REPO, env=env, stdout=out, stderr=err)
    try:
        torch.set_num_threads(1)
        train(load_recipe(folder / "r.toml", [f"run.dir={folder / 'one'}"]), console=Console(quiet=True))
        code = launched.wait(90)
    finally:
        launched.terminate()
        launched.wait(30)
    assert code == 0, (folder / "err").read_text()[-3000:]
    return folder / "one", folder / "two", folder


def assert_same_run(one: Path, two: Path) -> None:
    rows = [[json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (one, two)]
    assert len(rows[0]) == len(rows[1]) == 4 and sum(row["grad/norm"] for row in rows[0][1:]) > 0.1
    for a, b in zip(*rows, strict=True):
        for key in a:
            if not key.startswith(("time/", "verifier/")) and key not in ("logp_gap/max_nats", "tokens/trained"):
                assert_close_rows(a[key], b[key], f"step {a['step']} {key}")


def test_two_processes_give_what_one_gives(pair) -> None:
    one, two, folder = pair
    assert_same_run(one, two)
    assert json.loads((two / "manifest.json").read_text())["processes"] == 2
    assert json.loads((folder / "out").read_text()) == json.loads((two / "summary.json").read_text())
    said = (folder / "err").read_text()
    assert "launch: OMP_NUM_THREADS=1 LLMRL_LAUNCH=" in said and "-m llmrl.torchrun --nnodes=1 --nproc-per-node=2" in said


def test_the_exit_code_is_the_first_failed_ranks() -> None:
    """torchrun would have made a 1 of it, so that a refused input looked like a failed run."""
    run = ["-m", "llmrl.torchrun", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", "--no-python"]
    script = "if [ $RANK = 1 ]; then exit 2; fi; sleep 60"
    began, env = time.monotonic(), {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *run, "sh", "-c", script], cwd=REPO, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and "rank 1 ended first, with exit code 2" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert time.monotonic() - began < 30


def test_two_nodes(pair, tmp_path: Path) -> None:
    """Two launches on one machine that meet at a port."""
    keys = [str(pair[2] / "r.toml"), f"run.dir={tmp_path / 'run'}"]
    command = [sys.executable, "-m", "llmrl.cli", "launch", *keys, "--gpus", "0", "--nodes", "2", "--master", f"127.0.0.1:{free_port()}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    with (tmp_path / "log").open("w") as log:
        nodes = [subprocess.Popen([*command, "--node-rank", str(k)], cwd=REPO, env=env, stdout=log, stderr=log) for k in (1, 0)]
        try:
            codes = [node.wait(90) for node in nodes]
        finally:
            for node in nodes:
                node.terminate()
                node.wait(30)
    assert codes == [0, 0], (tmp_path / "log").read_text()[-3000:]
    assert_same_run(pair[0], tmp_path / "run")
    assert len(list((tmp_path / "run.logs").glob("node-*/*/attempt_0/*/stderr.log"))) == 2
    assert "launch: on node 1: llmrl launch" in (tmp_path / "log").read_text()


def test_no_rank_and_no_verifier_outlives_a_killed_command(tmp_path: Path) -> None:
    run_id = f"kill-{os.getpid()}"
    command = [sys.executable, "-m", "llmrl.cli", "launch", str(QUICK), *TINY, "steps=100000", f"run.dir={tmp_path / 'run'}", "--gpus", "0"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    with (tmp_path / "log").open("w") as log:
        launched = subprocess.Popen([*command, "--procs", "2", "--run-id", run_id], cwd=REPO, env=env, stdout=log, stderr=log)
    try:
        deadline, metrics = time.monotonic() + 60, tmp_path / "run" / "metrics.jsonl"
        while time.monotonic() < deadline and not (metrics.is_file() and metrics.read_text().count("\n") > 2):
            time.sleep(0.1)
        assert len(marked(run_id)) >= 3 + 2 * 2, (tmp_path / "log").read_text()  # torchrun, two ranks, two verifier workers each
        launched.kill()
        launched.wait(30)
        assert none_left(run_id)
    finally:
        launched.kill()
        launched.wait()


def test_servers_of_a_trainer_that_fails_are_ended(fake: str, served: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    keys = (f"model.path={served}", "model.tiny=", "warm_start=", f"run.dir={tmp_path / 'run'}")  # no tokenizer there: the trainer refuses it
    port = free_port()
    asked = Asked(QUICK, keys, gpus=0, vllm=2, vllm_python=fake, vllm_port=port, run_id=f"fail-{port}")
    assert launch(make_plan(asked, "run")) == 2
    said = capfd.readouterr().err
    assert "2 of 2 vLLM servers ready" in said and "no tokenizer could be loaded" in said
    assert none_left(f"fail-{port}", 0.0) and not (tmp_path / "run").exists()
    assert len(list((tmp_path / "run.logs").glob("*/vllm-*.log"))) == 2


def test_weights_are_named_as_the_launch_looks_for_them(tmp_path: Path) -> None:
    assert WeightFiles(tmp_path).folder.name.startswith(f"run-{zlib.crc32(socket.gethostname().encode()):08x}-{os.getpid()}-")
