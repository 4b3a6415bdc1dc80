"""Every shipped rule holds the contract of tests/contracts/rule.py, and the contract finds rules that break it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmrl import plugins
from tests.contracts.rule import Trial, check_rule
from tests.test_lm_transport import tiny_reward

torch.set_num_threads(1)
EXPLAINED = {"template": "tiny", "marks": ["#"], "cut": "mark", "answer_format": "#{answer}", "min_tokens": 1}
KEYS: dict[str, list[dict[str, object]]] = {
    "grpo": [{"kl": 0.05, "entropy": 0.01}, {"kl": 0.05, "kl_form": "k1", "mismatch": "sequence_mask"}],
    "dapo": [{"dynamic_rounds": 0, "overlong_cache": 4}],
    "reinforce_pp": [{}, {"baseline": True}],
    "expo": [EXPLAINED],
    "exp_dpo": [EXPLAINED],
    "gasp": [{"polluter_template": "tiny", "repair_template": "tiny", "cut": "=", "chunk_min": 1, "chunk_target": 2, "chunk_max": 4, "answer_marks": ["#"]}],
    "clip_cov": [{"fraction": 0.2, "bounds": [0.1, 9.0]}],
    "kl_cov": [{"fraction": 0.2}],
    "canon": [{}, {"metric": "nll", "mu": "cosine_inter_first", "alpha": 0.9}],
    "adora": [{"renorm": True}],
    "copo": [{"consistency": True}],
    "hdpo": [{"mark": "-"}, {"mark": "-", "coupled": True}],
    "g2rpo": [{}, {"stages": 2, "lengths": {"a": [0, 3, 5, 12]}, "entropy_band": [0.2, 0.6]}],
    "grpo_n": [{"switch_step": 2, "renormalise": True}],
    "drpo": [{}, {"form": "advantage", "mask_truncated": True}],
    "spae": [{"dynamic_rounds": 0, "probe": "#", "boundary": "1", "probes": 2, "probe_tokens": 3}],
    "b_star": [{"every": 1, "temperatures": [0.7, 1.3], "thresholds": [-1.0, 0.5]}, {"every": 2, "temperatures": [1.0], "unique": "equations"}],
    "v0": [{}, {"average": "prompt", "allocate": "greedy"}, {"value": "learned", "context": 8}],
    "r3": [{"template": "tiny"}, {"template": "tiny", "ranked": 0.0, "alpha": 2.0, "kl": 0.01}],
    "verl_erank": [{"stride": 2, "kl": 0.05}, {"stride": 2, "last_token_only": True}],
    "spo": [{}, {"opponent": "answer", "scale": False}],
    "inpo": [{"eta": 0.5, "tau": 0.1}, {"opponent": "sibling", "both_ways": False}],
    "urpo": [{"template": "tiny"}, {"template": "tiny", "calls": 2, "kl": 0.05}],
    "hbpo": [{"prefix": "({budget})", "budgets": [0.25, 0.5]}],
}
"""What the tiny model needs, or what makes a rule show all it has; other rules run with their defaults."""
NEEDS_FILES = {"dagger", "sotopia", "vgf"}
"""vgf is tried below, with the reward model that it is given; dagger in an environment and sotopia with attributions: see their own tests."""
RULES = sorted(set(plugins.available("llmrl.rules")) - NEEDS_FILES)


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    with Trial(tmp_path_factory.mktemp("trial")) as trial:
        yield trial


@pytest.fixture(scope="module")
def with_reward(trial, tmp_path_factory):
    """A folder with a random reward model of the trial's tokenizer."""
    folder = tmp_path_factory.mktemp("reward")
    reward = tiny_reward(trial.session.policy.chat.tokenizer)
    for part in (reward.model, reward.tokenizer):
        part.save_pretrained(folder / "rm")
    return folder


@pytest.mark.filterwarnings("ignore:canon")
@pytest.mark.parametrize(("name", "keys"), [(name, keys) for name in RULES for keys in KEYS.get(name, [{}])], ids=lambda x: x if isinstance(x, str) else "")
def test_shipped_rules(trial, name, keys):
    check_rule(trial, name, keys, base=Path(__file__).parent)


@pytest.mark.parametrize(
    "keys",
    [
        {"steps": 2, "kl": 0.05},
        {"form": "members", "kl": 0.05},
        {"value": "head", "value_window": 8, "candidates": 6, "guard": 2.0, "select": "verifier"},
        {"form": "members", "value": "head", "value_window": 16, "velocity": "pooled"},
    ],
    ids=str,
)
def test_vgf(trial, with_reward, keys):
    check_rule(trial, "vgf", {"reward_model": "./rm", "steps": 6, "eps": 1.0, "guard": None, **keys}, base=with_reward)


BROKEN = '''
import torch
from llmrl import credit as c, losses
from llmrl.rules.base import Rule, Term

def micro():
    """Divides by what happens to be in the micro-batch."""
    def fn(batch, out):
        return -batch.adv_T * out.logp_T / len(batch.adv_T)
    return Rule(c.Credit((c.center(),)), (Term(fn),))

def rank():
    """Centres on the rewards of its own rank."""
    own = c.stateless("own", lambda a, view: a - a[view.scored_S].mean())
    return Rule(c.Credit((own,)), (Term(losses.reinforce()),))

def place():
    """The first sample of a group is the best."""
    own = c.stateless("first", lambda a, view: (torch.arange(len(a)) % 4 == 0).double())
    return Rule(c.Credit((own,)), (Term(losses.reinforce()),))

COUNT = [0]
def hidden():
    """State that no checkpoint sees."""
    def f(a, view):
        COUNT[0] += 1
        return a * (1 + (COUNT[0] > 8) * COUNT[0])
    return Rule(c.Credit((c.stateless("hidden", f),)), (Term(losses.reinforce()),))
'''


@pytest.mark.parametrize(
    ("name", "says"),
    [("micro", "micro-batches of"), ("rank", "two ranks"), ("place", "reverse order|two ranks"), ("hidden", "advantages differ|another gradient")],
)
def test_broken_rules_are_found(trial, tmp_path, name, says):
    (tmp_path / "mine.py").write_text(BROKEN)
    with pytest.raises(AssertionError, match=says):
        check_rule(trial, f"./mine.py:{name}", base=tmp_path)
