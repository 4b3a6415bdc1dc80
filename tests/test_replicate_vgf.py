"""scripts/replicate_vgf.py: best-of-N over all choices, and what the arms of the study cost, by hand."""

import importlib.util
import json
import sys
import tomllib
from itertools import combinations
from math import comb
from pathlib import Path

import pytest

from llmrl.config import load_recipe
from llmrl.lm_transport import Readout

REPO = Path(__file__).parents[1]
HERE = REPO / "recipes" / "replication" / "vgf"
sys.path.insert(0, str(REPO / "scripts"))  # it imports its neighbour
spec = importlib.util.spec_from_file_location("replicate_vgf", REPO / "scripts" / "replicate_vgf.py")
vgf = importlib.util.module_from_spec(spec)
spec.loader.exec_module(vgf)
sys.path.pop(0)

SAMPLES = {"gold": [0.2, 0.9, 0.5, 0.4, 0.7, 0.1], "reward": [1.0, 2.5, 3.0, 0.5, 2.5, -1.0], "second": [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]}
SAMPLES["against"] = [0.5, 0.3, 0.8]
WINS = [0, 100, 50, 100 / 3, 200 / 3, 0]  # of three others; a tie counts half


@pytest.fixture(autouse=True)
def study(monkeypatch):
    told = tomllib.loads((HERE / "study.toml").read_text())
    monkeypatch.setattr(vgf, "STUDY", told)
    return told


def test_best_of_n_is_the_mean_over_all_choices():
    for size in range(1, 7):
        best = [max(chosen, key=lambda i: (SAMPLES["reward"][i], -i)) for chosen in combinations(range(6), size)]
        row = vgf.best_of(SAMPLES, size)
        for key in ("gold", "reward", "second"):
            assert row[key] == pytest.approx(sum(SAMPLES[key][i] for i in best) / len(best), abs=1e-12)
        assert vgf.win(row) == pytest.approx(sum(WINS[i] for i in best) / len(best), abs=1e-12)
        assert vgf.shares(6, size) == pytest.approx([comb(5 - k, size - 1) / comb(6, size) for k in range(6)], abs=1e-15)
    assert (vgf.best_of(SAMPLES, 6)["gold"], vgf.win(vgf.best_of(SAMPLES, 6))) == (0.5, 50.0)
    assert vgf.best_of(SAMPLES, 2, first=2)["gold"] == 0.9 and vgf.best_of(SAMPLES, 1)["gold"] == pytest.approx(sum(SAMPLES["gold"]) / 6)
    assert sum(vgf.shares(600, 116)) == pytest.approx(1.0, abs=1e-12)


def arm(name):
    told = vgf.STUDY["arms"][name]
    return load_recipe(HERE / "small.toml", [*(x.replace("{reward}", "rm").replace("{work}", "w") for x in told), "warm_start="]).recipe.model_dump(mode="json")


def test_costs_by_hand():
    """In forwards of a response: 480 prompts in every arm but DPO, which has 1,440 pairs."""
    cost = {name: vgf.cost_of_training(arm(name)) for name in vgf.STUDY["arms"]}
    assert cost["DPO on the same pairs"] == 1440 * 2 * 5 and cost["GRPO on the reward model"] == 480 * 8 * 6
    assert cost["rule vgf, L = 0 (best-of-8 fine-tuning)"] == cost["rule vgf, L = 0, gold decides"] == 480 * (8 * 2 + 3)
    four = 480 * (8 * (1 + 3 * 4 + 2 + 2) + 3)  # sampled; 4 forwards and backwards, 2 forwards; the guard's 2
    assert cost["rule vgf, L = 4, the reward model decides"] == cost["rule vgf, L = 4, gold decides"] == four
    assert cost["rule vgf, L = 4, gold decides, value head"] == four + 480 * 16
    assert cost["rule vgf, L = 0, N = 68 (compute of L = 4)"] == cost["rule vgf, L = 0, N = 68, gold decides"] == four
    rows = [{"all_passes": 3.0}, {"all_passes": 5.0}]
    assert vgf.cost_at_test_time(rows, Readout(2)) == pytest.approx(8 * (1 + 3 * 2 + 2 + 2 + 4)) and vgf.cost_at_test_time(rows, Readout(0)) == 16
    over = [name for name, c in cost.items() if c / vgf.STUDY["eval_prompts"] / 2 > vgf.STUDY["pool"]]
    assert over == ["rule vgf, L = 4, gold decides, value head"]  # N' is 620, and the pool has 600


def test_the_table_lays_an_arm_against_the_best_of_n_of_its_cost(tmp_path):
    """Twenty prompts alike, a pool of 6: an arm that costs 12 forwards a prompt meets best-of-6, and one that was trained pays for itself by and by."""
    vgf.STUDY |= {"pool": 6, "n": 2, "steps": [1], "transports": {"": {"guard": "none"}}, "variants": {"v": {}}}
    vgf.STUDY["arms"] = {"GRPO on the reward model": vgf.STUDY["arms"]["GRPO on the reward model"]}
    run = vgf.Seed(0, tmp_path, "v")
    row = {"gold": 0.5, "all_gold": 0.6, "against": SAMPLES["against"], "reward": 1.0, "second": 1.0, "all_passes": 0.0}
    (run.work / "test-time.json").write_text(json.dumps({"samples": [SAMPLES] * 20, "arms": {"VGF, L = 1": [row] * 20}}))
    name = "GRPO on the reward model"
    (run.work / f"{vgf.slug(name)}.json").write_text(json.dumps([row] * 20))
    (run.work / vgf.slug(name)).mkdir()
    (run.work / vgf.slug(name) / "manifest.json").write_text(json.dumps({"recipe": arm(name)}))
    lines = vgf.equal_compute_table([run], ["VGF, L = 1", name])
    curve = [vgf.win(vgf.best_of(SAMPLES, size)) for size in range(1, 7)]
    as_good = next(i for i, w in enumerate(curve, 1) if w >= 50)
    assert as_good == 2
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in lines[2:]]
    assert cells[0][:5] == ["VGF, L = 1", "12", "6", "50.0 ± 0.0", f"{curve[5]:.1f} ± 0.0"] and cells[0][-2:] == ["2", "-"]
    assert cells[1][1:3] == [f"{1 + 23040 / 20:.0f}", "6"] and cells[1][-2:] == ["2", f"{23040 / (2 * 2 - 1):.0f}"]
