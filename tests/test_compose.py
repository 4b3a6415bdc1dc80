"""Rules composed in a recipe: three that make sense, in numbers and under the rules' contract, and those that contradict themselves."""

from __future__ import annotations

import math

import pytest
import torch

from llmrl import credit as c
from llmrl import losses
from llmrl.compose import build_rule, parts, with_mismatch
from llmrl.config import check_plugins, load_recipe
from llmrl.recipe import RulePlugin
from llmrl.records import InputError
from llmrl.rules.canon import canon
from llmrl.rules.grpo import dapo, dr_grpo, grpo
from tests.builders import make_view
from tests.contracts.rule import Trial, check_rule

torch.set_num_threads(1)
COMBINATIONS = [
    {"use": "dapo", "dynamic_rounds": 0, "credit": ["canon", {"use": "clip_adv", "limit": 0.4}]},
    {"use": "gspo", "credit": ["adora"], "loss": [{"use": "kl_k3", "coef": 0.05}, {"use": "entropy_bonus", "coef": 0.01, "over": "token"}]},
    {"use": "dr_grpo", "credit": [{"use": "kl_in_reward", "coef": 0.1}, "rloo", "whiten"], "mismatch": "sequence_mask", "mismatch_max": 3.0},
]


def build(tmp_path, **keys):
    return build_rule(RulePlugin.model_validate({"use": "grpo", **keys}), tmp_path)


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    with Trial(tmp_path_factory.mktemp("trial")) as trial:
        yield trial


@pytest.mark.filterwarnings("ignore:canon")
@pytest.mark.parametrize("keys", COMBINATIONS, ids=lambda k: k["use"])
def test_combinations_hold_the_contract_of_rules(trial, tmp_path, keys):
    check_rule(trial, keys["use"], {k: v for k, v in keys.items() if k != "use"}, base=tmp_path)


def test_the_credit_is_the_other_rules_and_the_rest_its_own(tmp_path):
    """canon's advantages, cut off at 0.4, under dapo's loss."""
    rule, mine = build(tmp_path, **COMBINATIONS[0]), dapo(dynamic_rounds=0)
    entropies = [[0.1, 0.2], [0.9], [0.4, 0.4, 0.5], [0.7, 0.1]]
    view = make_view([1, 0, 1, 0], [0] * 4, [2, 1, 3, 2], streams={"old_entropy": entropies})
    own = canon().credit.update(view, canon().credit.init())[0]
    assert float(own.abs().max()) > 0.45, "the example must reach the limit"
    assert rule.credit.update(view, rule.credit.init())[0].tolist() == own.clamp(-0.4, 0.4).tolist()
    assert [(t.label, t.over, t.fn.clip_bounds) for t in rule.loss] == [(t.label, t.over, t.fn.clip_bounds) for t in mine.loss]
    assert rule.collect.func is mine.collect.func and rule.needs.old_entropy and not mine.needs.old_entropy
    assert list(rule.credit.init()) == ["canon", "clip_adv"], "its state is named, so that a checkpoint holds it"


def test_kl_in_the_reward_then_leave_one_out_then_whitening(tmp_path):
    """By hand: KL sums 0.2, 0, 0, 0.1 times 0.1 off rewards 1, 0, 1, 0; leave-one-out; whitened over 5 tokens."""
    rule = build(tmp_path, **COMBINATIONS[2])
    streams = {"old_logp": [[-0.5, -0.4], [-1], [-1], [-0.2]], "ref_logp": [[-0.6, -0.5], [-1], [-1], [-0.3]]}
    view = make_view([1, 0, 1, 0], [0, 0, 1, 1], [2, 1, 1, 1], streams=streams)
    a = [0.98, 0.98, -0.98, 1.01, -1.01]
    mean = sum(a) / 5
    std = math.sqrt(sum((x - mean) ** 2 for x in a) / 4 + 1e-8)
    assert rule.credit.update(view, rule.credit.init())[0].tolist() == pytest.approx([(x - mean) / std for x in a], abs=1e-12)
    assert rule.needs.ref_logp and rule.needs.old_logp
    assert all(t.fn.corrects_mismatch for t in rule.loss) and rule.loss[0].over == "fixed"


def test_further_terms_are_reduced_as_the_first_and_bring_their_needs(tmp_path):
    rule = build(tmp_path, **COMBINATIONS[1])
    assert [(t.label, t.over, t.coef) for t in rule.loss] == [("gspo", "sample", 1.0), ("kl_k3", "sample", 0.05), ("entropy_bonus", "token", 0.01)]
    assert rule.needs.ref_logp and rule.needs.entropy
    kl = grpo(kl=0.05)
    composed = build(tmp_path, loss=[{"use": "kl_k3", "coef": 0.05}])
    assert [(t.label, t.over, t.coef, t.budget) for t in composed.loss] == [(t.label, t.over, t.coef, t.budget) for t in kl.loss] and composed.needs == kl.needs
    fixed = build(tmp_path, use="dr_grpo", budget=7, loss=[{"use": "kl_k2", "coef": 0.1}, {"use": "kl_k2", "coef": 0.1, "over": "token"}][:1])
    assert [t.budget for t in fixed.loss] == [7, 7] == [t.budget for t in dr_grpo(budget=7, kl=0.1, kl_form="k2").loss]


def test_own_parts_from_a_file(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from llmrl import credit as c\n"
        "def half(): return c.stateless('half', lambda a, view: a / 2)\n"
        "def both(): return c.Credit((c.center(), half()), (c.clip_adv(limit=0.2),))\n"
        "def square():\n    def square(batch, out):\n        return out.logp_T ** 2\n    return square\n"
    )
    rule = build(tmp_path, credit=["./mine.py:both"], loss=[{"use": "./mine.py:square", "coef": 0.5}])
    a = rule.credit.update(make_view([1, 0, 0, 0], [0] * 4), rule.credit.init())[0]
    assert a.tolist() == [0.2, -0.125, -0.125, -0.125] and [t.label for t in rule.loss] == ["pg_clip", "square"]
    spec = RulePlugin.model_validate({"use": "grpo", "credit": ["rloo", "canon"], "loss": [{"use": "ce", "coef": 1.0}]})
    assert [home for _, _, home in parts(spec)] == ["llmrl.credit", "llmrl.rules", "llmrl.losses"]


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"credit": ["canon", "adora"]}, "canon and adora each make the advantage"),
        ({"use": "drpo", "credit": ["canon"]}, "another credit would do nothing"),
        ({"use": "rloo", "credit": ["canon"]}, "takes its KL penalty off the reward"),
        ({"use": "hdpo", "mark": "-", "credit": ["canon"]}, 'reads the channel "tool"'),
        ({"use": "spae", "credit": ["canon"]}, "rollouts of its own"),
        ({"use": "dapo", "credit": ["spae"]}, "dynamic_rounds = 0"),
        ({"credit": ["kl_cov"]}, "use it as rule.use"),
        ({"credit": ["drpo"]}, "no advantage"),
        ({"credit": ["whiten", "center"]}, "stands behind whiten"),
        ({"credit": ["center", "center"]}, "share a name"),
        ({"credit": ["cannon"]}, 'nearest: "canon"'),
        ({"credit": [{"use": "clip_adv", "limits": 3}]}, 'nearest: "limit"'),
        ({"credit": [{"use": "clip_adv", "limit": -1.0}]}, "must be positive"),
        ({"loss": [{"use": "cispo", "coef": 1.0}]}, "is a policy loss"),
        ({"loss": [{"use": "kl_k1", "coef": 1.0}]}, "zero in expectation"),
        ({"kl": 0.1, "loss": [{"use": "kl_k2", "coef": 1.0}]}, "has kl_k3 already"),
        ({"kl": 0.1, "kl_form": "k1", "loss": [{"use": "kl_k2", "coef": 1.0}]}, "has kl_in_reward already"),
        ({"use": "drpo", "mismatch": "token_mask"}, "nothing to correct"),
        ({"mismatch_max": 3.0}, "does nothing without `mismatch`"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_contradictions_are_refused(tmp_path, keys, says):
    with pytest.raises(InputError, match=r"\[rule\]") as caught:
        build(tmp_path, **keys)
    assert says in str(caught.value)


def test_mismatch_reaches_every_policy_loss_and_no_other():
    rule = with_mismatch(grpo(kl=0.1), "token_truncate", 2.0)
    assert [hasattr(t.fn, "corrects_mismatch") for t in rule.loss] == [True, False]
    two = c.Credit((c.center(),), channels={"more": c.Credit((c.rloo(),))})
    from llmrl.rules.base import Rule, Term

    both = with_mismatch(Rule(two, (Term(losses.pg_clip()), Term(losses.on_channel(losses.pg_clip(), "more")))), "token_mask")
    assert [hasattr(t.fn, "corrects_mismatch") for t in both.loss] == [True, True]
    with pytest.raises(InputError, match="corrects the mismatch itself"):
        with_mismatch(both, "token_mask")


RECIPE = """
steps = 2
[model]
path = "tiny"
[data]
path = "chains"
holdout = 10
[data.args]
rows = 100
[rollout]
group = {group}
[rule]
use = "reinforce_pp"
{rule}
[verifier]
use = "exact"
"""


@pytest.mark.parametrize(
    ("rule", "group", "says"),
    [
        ('credit = ["canon"]', 1, r"line 14: rule.credit \(credit\[0\]\): canon compares the samples"),
        ('credit = ["canom"]', 4, 'line 14: rule.credit: .* nearest: "canon"'),
        ('loss = [{ use = "kl_k3" }]', 4, "line 14: rule.loss.0.coef: missing"),
        ('loss = [{ use = "kl_k9", coef = 0.1 }]', 4, r'line 14: rule.loss \(loss\[0\]\): .* nearest: "kl_k3"'),
        ('mismatch = "yes"', 4, "line 14: rule.mismatch"),
    ],
)
def test_a_recipe_names_the_line(tmp_path, rule, group, says):
    (tmp_path / "r.toml").write_text(RECIPE.format(rule=rule, group=group))
    with pytest.raises(InputError, match=says):
        check_plugins(load_recipe(tmp_path / "r.toml"))


def test_a_rule_may_not_take_the_sections_own_names(tmp_path):
    (tmp_path / "mine.py").write_text("def mine(*, credit: float = 1.0): ...\n")
    (tmp_path / "r.toml").write_text(RECIPE.format(rule="", group=4).replace('"reinforce_pp"', '"./mine.py:mine"'))
    with pytest.raises(InputError, match=r'has a keyword "credit", a key of \[rule\] itself'):
        check_plugins(load_recipe(tmp_path / "r.toml"))


# ---------------------------------------------------------------- extends


def test_a_recipe_extends_another(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "rows.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    (tmp_path / "base" / "units.py").write_text("def units(*, tolerance: float = 1e-6): ...\n")
    text = RECIPE.format(rule="kl = 0.5", group=4).replace('path = "chains"', 'path = "./rows.jsonl"').replace("[data.args]\nrows = 100\n", "")
    (tmp_path / "base" / "a.toml").write_text(text.replace('"exact"', '"./units.py:units"') + "tolerance = 0.5\n")
    (tmp_path / "b.toml").write_text('extends = "base/a.toml"\nsteps = 5\n[rollout]\nprompts = 2\n[rule]\nuse = "rloo"\n')
    loaded = load_recipe(tmp_path / "b.toml", ["rollout.group=8"])
    r = loaded.recipe
    assert (r.steps, r.rollout.prompts, r.rollout.group, r.data.path) == (5, 2, 8, str(tmp_path / "base" / "rows.jsonl"))
    assert (r.rule.use, r.rule.kwargs) == ("rloo", {}), "keywords of the other rule stay behind"
    assert r.verifier.use == f"{tmp_path / 'base' / 'units.py'}:units" and r.verifier.kwargs == {"tolerance": 0.5}
    assert r.run.dir == "runs/b" and loaded.origins["model.path"] == "file"
    assert loaded.where("steps") == f"{tmp_path / 'b.toml'}, line 2: steps"
    assert loaded.where("model.path") == f"{tmp_path / 'base' / 'a.toml'}, line 4: model.path", "the file that it stands in"
    (tmp_path / "c.toml").write_text('extends = "b.toml"\n[rule]\nkl = 0.25\n')
    assert load_recipe(tmp_path / "c.toml").recipe.rule.kwargs == {"kl": 0.25}


def test_what_cannot_be_extended(tmp_path):
    (tmp_path / "a.toml").write_text('extends = "b.toml"\n')
    (tmp_path / "b.toml").write_text('extends = "a.toml"\n')
    with pytest.raises(InputError, match=r"which extends it in turn: a.toml -> b.toml -> a.toml"):
        load_recipe(tmp_path / "a.toml")
    (tmp_path / "b.toml").write_text("extends = 3\n")
    with pytest.raises(InputError, match=r"b.toml, line 1: extends: got 3"):
        load_recipe(tmp_path / "a.toml")
    (tmp_path / "a.toml").write_text('extends = "c.toml"\n')
    with pytest.raises(InputError, match=r"c.toml: no such recipe"):
        load_recipe(tmp_path / "a.toml")
