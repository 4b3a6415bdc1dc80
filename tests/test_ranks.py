"""Two processes against one: the same samples, gradients, weights, metrics, evaluation and run folder (gloo, CPU)."""

import json
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from llmrl.models import load_tokenizer
from llmrl.recipe import Model
from llmrl.samples import read_rows
from tests.test_lm_transport import tiny_reward

REPO = Path(__file__).parents[1]
RECIPE = """
seed = 4
steps = 3
model = { path = "tiny", tiny = { hidden = 32, layers = 2, heads = 4, kv_heads = 2, ffn = 64 } }
data = { path = "./rows.jsonl", shuffle = false, holdout = 0 }
eval = { rows = 5, every = 2, data = { path = "./held.jsonl" } }
rollout = { prompts = 4, group = 4, max_new_tokens = 10 }
verifier = { use = "./judge.py:judge" }
scoring = { workers = 1 }
batch = { tokens = 90 }
optim = { lr = 1e-3, eps = 1e-2, clip_norm = 0.05 }
checkpoint = { every = 2 }
"""
JUDGE = '''from llmrl.records import Verdict
def judge():
    """Right iff the characters' codes add up to an even number; "dead" rows are never right, in "lost" rows nothing can be judged."""
    def verify(prompt, response):
        if prompt.answer == "lost" and len(response) % 2:
            return Verdict(None, "error")
        return Verdict(float(prompt.answer != "dead" and sum(map(ord, response)) % 2 == 0))
    return verify
'''
GAME = '''from llmrl.environment import Step
class Game:
    """Up to three turns, told the last figure of the sum of its characters' codes; a turn of an uneven sum costs 0.1. One in seven breaks it."""
    async def reset(self, prompt, seed):
        self.said = 0
        return prompt.messages
    async def step(self, action):
        code, self.said = sum(map(ord, action.text)), self.said + 1
        if code % 7 == 3:
            raise RuntimeError("broken")
        price = {"reward": -0.1 * (code % 2), "numbers": {"attribution": code % 4}}
        return Step(done=True, **price) if self.said == 3 else Step(({"role": "user", "content": str(code % 10)},), **price)
    async def close(self): ...
    async def expert(self):
        return str(self.said)
def game():
    return Game
'''
SCRIPT = '''"""Two steps of each rule by hand, then a whole run; everything worth comparing is written to a folder."""
import json, os, sys
from pathlib import Path

import torch
from safetensors.torch import save_file

torch.set_num_threads(1)
from llmrl.config import load_recipe
from llmrl.console import Console
from llmrl.learner import Learner
from llmrl.samples import sample_rows, write_rows
from llmrl.session import open_session
from llmrl.step import run_step
from llmrl.train import train

here, out = Path(sys.argv[1]), Path(sys.argv[2])
warm = "warm_start={steps=5, examples=6, data={path='ROWS'}, optim={lr=1e-3, eps=1e-2}}".replace("ROWS", str(here / "rows.jsonl"))
play = ["environment={use='GAME', max_turns=3}".replace("GAME", f"{here}/game.py:game")]
play += ["rollout.stop=['1', '3', '5', '7', '9', '+', '=']", "scoring.max_failure_rate=1.0"]
RULES = {
    "dapo": ["rule={use='dapo', dynamic_rounds=0}"],
    "whitened": ["rule={use='reinforce_pp', kl=0.1, entropy=0.01}"],
    "several": ["rule={use='grpo'}", "batch.epochs=2"],
    "vgf": ["rule={use='vgf', reward_model='./rm', steps=8, eps=1.0, guard=0.2, select='verifier', value='head', value_window=8}"],
    "play": ["rule={use='dapo', dynamic_rounds=0}", *play],
    "talk": ["rule={use='sotopia'}", *play],
    "taught": ["rule={use='dagger', decay=0.5, replay=0.5}", *play],
}


def steps(name, keys):
    session = open_session(load_recipe(here / "r.toml", keys))
    learner, grads = session.learner, {}
    learner.start(session.recipe.optim)
    learner.freeze_reference()
    learner.held.optimizer.register_step_pre_hook(
        lambda *_: grads.update({f"{learner.version}/{n}": p.grad.clone() for n, p in learner.params})
    )
    rows = []
    for step in (1, 2):
        groups, adv, row = run_step(session, step)
        write_rows(out / f"{name}-{step}-{session.rank}.jsonl.gz", sample_rows(step, groups, adv))
        rows.append(row)
    if session.rank == 0:
        save_file({n: p.detach().contiguous() for n, p in learner.params}, out / f"{name}-weights.safetensors")
        save_file(grads, out / f"{name}-grads.safetensors")
        (out / f"{name}.json").write_text(json.dumps(rows))
    mine = torch.stack([p.detach().double().sum() for _, p in learner.params])
    assert torch.equal(learner.all_max(mine), mine) and torch.equal(-learner.all_max(-mine), mine), "ranks hold other weights"
    session.close()


for name, keys in RULES.items():
    steps(name, keys)
keys = [f"run.dir={out / 'run'}", "rule={use='dapo', dynamic_rounds=0, kl=0.05}", warm]
train(load_recipe(here / "r.toml", [*keys, "steps=2"]), console=Console(quiet=True))
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
'''


def write_inputs(folder):
    """Step 1: prompts 0-3, all alive. Step 2: 4-7, of which the second rank's (5 and 7) have no advantage. Step 3: 8-11."""
    answers = ["live", "lost", "live", "live", "live", "dead", "lost", "dead", "live", "lost", "live", "live"]
    rows = [{"id": f"q{i}", "prompt": f"{i}+{i * 7 % 5}" + "-1" * (i % 4) + "=", "answer": a, "solution": f"{i}#{i}"} for i, a in enumerate(answers)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "held.jsonl").write_text("".join(json.dumps({"id": f"h{i}", "prompt": f"9-{i}=", "answer": "live"}) + "\n" for i in range(5)))
    (folder / "judge.py").write_text(JUDGE)
    (folder / "game.py").write_text(GAME)
    (folder / "r.toml").write_text(RECIPE)
    (folder / "ranks.py").write_text(SCRIPT)
    reward = tiny_reward(load_tokenizer(Model(path="tiny")).tokenizer)
    for part in (reward.model, reward.tokenizer):
        part.save_pretrained(folder / "rm")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(one process, two processes): the folders that the script left."""
    folder = tmp_path_factory.mktemp("ranks")
    write_inputs(folder)
    one, two = folder / "one", folder / "two"
    one.mkdir(), two.mkdir()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), "CUDA_VISIBLE_DEVICES": ""}
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    with (folder / "log").open("w") as log:  # no pipe: workers of a launcher that died would hold it open
        command = [sys.executable, *launch, str(folder / "ranks.py"), str(folder), str(two)]
        pair = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    before = sys.argv
    sys.argv = ["ranks.py", str(folder), str(one)]
    try:
        runpy.run_path(str(folder / "ranks.py"))
        pair.wait(timeout=90)
    finally:
        sys.argv = before
        if pair.poll() is None:
            pair.terminate()  # the launcher ends its workers
            pair.wait(timeout=40)
    assert pair.returncode == 0, (folder / "log").read_text()[-4000:]
    return one, two


RULES = ["dapo", "whitened", "several", "vgf", "play", "talk", "taught"]


def by_id(folder, pattern):
    return {r["id"]: r for f in sorted(folder.glob(pattern)) for r in read_rows(f)}


def assert_close_rows(a, b, path=""):
    """Equal, numbers to 1e-5 of their size (and 2e-6 at least)."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for k in a:
            assert_close_rows(a[k], b[k], f"{path}/{k}")
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for k, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_close_rows(x, y, f"{path}/{k}")
    elif isinstance(a, float) and isinstance(b, float):
        assert a == pytest.approx(b, rel=1e-5, abs=2e-6, nan_ok=True), path
    else:
        assert a == b, path


@pytest.mark.parametrize("name", RULES)
def test_the_same_samples(folders, name):
    one, two = folders
    for step in (1, 2):
        a, b = by_id(one, f"{name}-{step}-*"), by_id(two, f"{name}-{step}-*")
        assert len(a) == len(b) and sum(r["role"] == "policy" for r in a.values()) == 16
        for key, row in a.items():
            assert row["token_ids"] == b[key]["token_ids"], key
            assert_close_rows(row, b[key], key)
    mine = [{r["prompt_id"] for r in read_rows(two / f"{name}-2-{rank}.jsonl.gz")} for rank in (0, 1)]
    assert mine == [{"q4", "q6"}, {"q5", "q7"}]


def test_transport_moved_texts_on_both_ranks_and_followed_one_value(folders):
    one, two = (json.loads((folder / "vgf.json").read_text()) for folder in folders)
    rows = [read_rows(folders[1] / f"vgf-2-{rank}.jsonl.gz") for rank in (0, 1)]
    assert all(any(r["role"] == "transported" and r["weights"]["transported"] for r in own) for own in rows)
    for a, b in zip(one, two, strict=True):
        assert 0 < a["rule/changed_share"] < 1 and a["rule/ref_drop_nats"] != 0 and a["rule/mmd"] > 0
        assert a["rule/value/ranked"] == b["rule/value/ranked"] and a["rule/reward/ranked"] == b["rule/reward/ranked"]
    assert one[0]["rule/value/ranked"] == one[0]["rule/reward/ranked"] != one[1]["rule/value/ranked"] != one[1]["rule/reward/ranked"]


@pytest.mark.parametrize("name", ["play", "talk", "taught"])
def test_episodes_had_turns_and_failures_on_both_ranks(folders, name):
    rows = [[r for step in (1, 2) for r in read_rows(folders[1] / f"{name}-{step}-{rank}.jsonl.gz")] for rank in (0, 1)]
    for own in rows:
        talked = [r for r in own if "mask" in r]
        assert len(talked) > 4 and all(0 < sum(r["mask"]) < len(r["mask"]) == len(r["token_ids"]) for r in talked)
        assert any(r["reward"] not in (None, 0.0, 1.0) for r in own) and any(r["reward"] is None for r in own)
    told = json.loads((folders[1] / f"{name}.json").read_text())
    assert all(r["rule/turns"] > 2 for r in told) and told[1]["rule/environment_failed"] > 0


def test_one_rank_had_nothing_to_learn(folders):
    rows = [read_rows(folders[1] / f"dapo-2-{rank}.jsonl.gz") for rank in (0, 1)]
    assert any(r["advantage"] for r in rows[0]) and not any(r["advantage"] for r in rows[1])
    assert any(r["reward"] is None for r in rows[0]) and any(r["weights"] == {"policy": 0.0} for r in rows[0])


@pytest.mark.parametrize("name", RULES)
def test_the_same_gradients_and_weights(folders, name):
    for what, tolerance in (("grads", 1e-6), ("weights", 1e-6)):
        a, b = (load_file(folder / f"{name}-{what}.safetensors") for folder in folders)
        assert a.keys() == b.keys() and (
            what == "weights" or len(a) == (4 if name == "several" else 2) * len(load_file(folders[0] / "dapo-weights.safetensors"))
        )
        for key in a:
            assert float((a[key] - b[key]).abs().max()) <= tolerance, (what, key)
        if what == "grads":
            assert max(float(g.abs().max()) for g in a.values()) > 1e-3


@pytest.mark.parametrize("name", RULES)
def test_the_same_metrics(folders, name):
    a, b = (json.loads((folder / f"{name}.json").read_text()) for folder in folders)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for key in x:
            # the largest gap is that of the first micro-batch, and a context is computed once a micro-batch: those are others
            if not key.startswith("time/") and key not in ("logp_gap/max_nats", "tokens/trained"):
                assert_close_rows(x[key], y[key], key)
        if name != "taught":  # nobody sampled labels
            assert x["logp_gap/max_nats"] < 1e-5 and y["logp_gap/max_nats"] < 1e-5
    assert a[0]["samples"] == 16 and -0.3 < a[0]["reward/mean"] < 1 and a[0]["reward/mean"] != 0 and a[1]["samples/unjudged"] > 0


def test_a_whole_run_on_two_ranks(folders):
    """Warm start, evaluation of five prompts on two ranks, checkpoint: the same model and summary as on one."""
    one, two = (folder / "run" for folder in folders)
    a, b = (json.loads((run / "summary.json").read_text()) for run in (one, two))
    for key in ("accuracy_before", "accuracy_after", "before", "after", "steps", "tokens"):
        assert_close_rows(a[key], b[key], key)
    assert a["after"]["eval/judged"] == 5
    name = "checkpoints/step-000002/model/model.safetensors"
    x, y = load_file(one / name), load_file(two / name)
    assert all(float((x[k] - y[k]).abs().max()) < 1e-6 for k in x)
    for kind in ("eval-000002*", "step-000002*"):
        assert_close_rows(by_id(one / "samples", kind), by_id(two / "samples", kind))
    files = {p.name for p in (two / "samples").iterdir()}
    assert {f"{kind}-000002{rank}.jsonl.gz" for kind in ("eval", "step") for rank in ("", ".rank1")} <= files
    kept = {p.name for p in (two / "checkpoints/step-000002").iterdir()}
    assert kept >= {"state.json", "random-rank0.json", "random-rank1.json", "state.safetensors", "model"}
    assert len((two / "metrics.jsonl").read_text().splitlines()) == 3
