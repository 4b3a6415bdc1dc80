"""`llmrl rules` tells of every shipped rule what its code says, and of one's own rule too."""

import json

import pytest
from typer.testing import CliRunner

from llmrl import plugins
from llmrl.cli import app
from llmrl.rule_list import facts_of

MINE = '''
from llmrl.rules import grpo as family

def mine(*, coef: float, low: float = 0.3):
    """grpo with a coefficient that must be given. arXiv:1234.56789 eq. 3.

    Differs from grpo: (1) that.
    """
    return family.grpo(low=low)

def plain(*, low: float = 0.3):
    return family.grpo(low=low)
'''


def run(*args):
    done = CliRunner().invoke(app, ["rules", *args])
    return done.exit_code, done.output, done.exception


def test_all_rules_are_listed_with_paper_needs_and_cost():
    code, text, _ = run("--json")
    rows = {r["name"]: r for r in json.loads(text)}
    assert code == 0 and set(rows) == set(plugins.available("llmrl.rules"))
    assert all(r["papers"] and len(r["line"]) > 20 and "arXiv:" not in r["line"].split(". ")[-1][:6] for r in rows.values())
    assert rows["canon"]["papers"] == ["2509.23962"] and rows["canon"]["cost"] == ["1 forward more (old_entropy)"]
    assert rows["verl_erank"]["cost"][0] == "1 forward more (hidden states)" and "prefix" in rows["verl_erank"]["cost"][1]
    assert rows["drpo"]["needs"] == ["groups of 2 or more", "whole groups in a micro-batch"]
    assert rows["reinforce_pp"]["needs"] == ["reference model"] and rows["reinforce_pp"]["cost"] == ["2 forwards more (old_logp, ref_logp)"]
    assert rows["grpo"]["cost"] == [] and rows["hdpo"]["cost"] == [] and "explanations" in rows["expo"]["cost"][0]


def test_every_rule_says_how_it_differs():
    for name in plugins.available("llmrl.rules"):
        f = facts_of(name)
        assert name in ("grpo", "dr_grpo", "gspo", "cispo", "dapo", "exp_dpo", "gasp", "vgf") or "Differs from" in f.docstring, name
        assert f.file.endswith(".py") and (f.keywords or name == "x")


def test_one_rule():
    code, text, _ = run("kl_cov")
    assert code == 0 and "fraction: float = 0.002" in text and "|logp_t - old_logp_t|" in text and "file: clip_cov.py" in text
    assert text.index("keywords:") > text.index("Differs from grpo")
    code, text, _ = run("copo", "--json")
    assert json.loads(text)["keywords"]["sharpness"] == "float = 5.0"


def test_the_list_names_the_command_for_more():
    code, text, _ = run()
    assert code == 0 and "arXiv 2402.03300" in text and "llmrl rules NAME" in text and len(text.splitlines()) > 40


def test_a_rule_of_ones_own(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    f = facts_of(f"{tmp_path}/mine.py:mine")
    assert (f.line, f.papers, f.cost) == ("grpo with a coefficient that must be given.", ["1234.56789"], ["depends on its keys"])
    assert f.needs == ["key coef", "groups of 2 or more"] and f.keywords == {"coef": "float", "low": "float = 0.3"}
    assert facts_of(f"{tmp_path}/mine.py:plain").line == "(no docstring)"


def test_a_name_that_is_none_is_refused_with_the_nearest():
    _, _, error = run("canonn")
    assert error is not None and 'nearest: "canon"' in str(error)
    with pytest.raises(Exception, match="has none of that name"):
        facts_of("nothing_like_it")
