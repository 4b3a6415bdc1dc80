"""Tokens that do not count (Sample.mask): outside credit and metrics, and kept on disk, in imports and on the page. Packing: test_batch.py."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from llmrl import credit as c
from llmrl.evaluation.importers import read_any
from llmrl.evaluation.report_run import run_page
from llmrl.evaluation.sample import rescore
from llmrl.records import Group, Prompt, Sample, Verdict
from llmrl.samples import read_rows, sample_rows, step_path, write_rows
from llmrl.step import give_credit, rollout_metrics, view_of

NAN = float("nan")
RANK = SimpleNamespace(all_sum=lambda x: x, all_max=lambda x: x, gather=lambda x: [x])


def episode(name="a/0", reward=1.0):
    """Two turns of 3 and 2 tokens with an observation of 2 between them."""
    return Sample(
        name, "a", [1, 5], [7, 8, 2, 9, 9, 6, 2], [-1.0, -2.0, -3.0, NAN, NAN, -4.0, -5.0], 0, text="cd ee b", verdict=Verdict(reward), reward=reward,
        streams={"turn": [0.0] * 5 + [1.0] * 2}, mask=[True] * 3 + [False] * 2 + [True] * 2,
    )  # fmt: skip


def plain(name="a/1", reward=0.0):
    return Sample(name, "a", [1, 5], [7, 2], [-0.5, -0.25], 0, text="c", verdict=Verdict(reward), reward=reward)


def test_credit_sees_what_counts():
    view = view_of([episode(), plain()], RANK, 8)
    assert view.length_S.tolist() == [5, 2] and view.sample_T.tolist() == [0] * 5 + [1] * 2
    assert view.streams["behavior_logp"].tolist() == [-1, -2, -3, -4, -5, -0.5, -0.25]
    assert view.streams["turn"][:5].tolist() == [0, 0, 0, 1, 1] and view.streams["turn"][5:].isnan().all()
    assert view.of_sample("behavior_logp").tolist() == [-1, -0.5]


def test_overlong_and_whiten_go_by_the_policy_s_tokens():
    """Limit 6, cache 2: 5 tokens are 1/2 too many, though the sequence has 7; the whitened mean is over 5 + 2 tokens."""
    view = view_of([episode(), plain()], RANK, 6)
    a_S, _ = c.overlong(cache=2).update(view.reward_S, {}, view)
    assert a_S.tolist() == [0.5, 0.0]
    adv, _ = give_credit(SimpleNamespace(credit=c.Credit((), (c.whiten(),))), [episode(), plain()], view, {"whiten": {}})
    assert [len(a) for a in adv] == [5, 2] and torch.cat(adv).sum().item() == pytest.approx(0, abs=1e-12)


def test_a_channel_comes_back_one_number_a_token():
    s, rule = episode(), SimpleNamespace(credit=c.Credit((), channels={"twice": c.Credit((), (c.stateless("x", lambda a, v: 2 * v.streams["turn"]),))}))
    give_credit(rule, [s], view_of([s], RANK, 8), rule.credit.init())
    assert s.streams["twice"][:3] == [0, 0, 0] and all(map(math.isnan, s.streams["twice"][3:5])) and s.streams["twice"][5:] == [2, 2]


def test_metrics_count_the_policy_s_tokens():
    row = rollout_metrics([episode(), plain()], [torch.ones(5), torch.zeros(2)], RANK)
    assert row["length/mean_tokens"] == 3.5 and row["length/max_tokens"] == 5 and row["entropy/rollout_nats"] == pytest.approx(15.75 / 7)


def test_on_disk_in_an_import_and_on_the_page(tmp_path):
    groups = [Group(Prompt("a", ({"role": "user", "content": "?"},), "b"), [episode(), plain()])]
    file = step_path(tmp_path, 1)
    write_rows(file, sample_rows(1, groups, [torch.tensor([1.0, 1, 1, 2, 2]), torch.zeros(2)]))
    masked, whole = read_rows(file)
    assert masked["mask"] == [True] * 3 + [False] * 2 + [True] * 2 and "mask" not in whole
    assert masked["logprobs"] == [-1, -2, -3, None, None, -4, -5] and masked["streams"]["turn"] == [0, 0, 0, None, None, 1, 1]
    assert masked["advantage"] == [1, 1, 1, None, None, 2, 2] and whole["advantage"] == 0
    first, second = read_any(tmp_path, format="run")
    assert first.token_ids == [7, 8, 2, 6, 2] and first.logprobs == [-1, -2, -3, -4, -5] and first.response == "cd ee b"
    assert second.token_ids == [7, 2] and "mask" not in second.extra
    (again,) = rescore(SimpleNamespace(score=lambda pairs: [[-float(t) for t in ids] for _, ids in pairs]), lambda t: [1], list, iter([first]))
    assert again.raw_logprobs == [-7, -8, -2, -6, -2]  # read in the whole conversation, kept where the policy wrote
    text = {7: "c", 8: "d", 9: "e", 6: "b", 2: ""}
    run_page(tmp_path, tmp_path / "page.html", text=lambda ids: "".join(text[i] for i in ids))
    page = (tmp_path / "page.html").read_text()
    shown = json.loads(page[page.index("{", page.index('type="application/json"')) : page.index("</script>", page.index('type="application/json"'))])
    (sample,) = [s for s in shown["traces"] if s["id"] == "a/0"]
    assert "".join(sample["tokens"]) == "cdeeb" and sample["p"][3:5] == [1.0, 1.0] and sample["low"] == [6]
    assert sample["length"] == 5 and sample["confidence"] == pytest.approx(math.exp(-5), rel=1e-2)


def test_subgroups_of_a_prompt_are_cohorts():
    """papers/agents.md section 1: the key is (prompt, guided or free). Pooled, the advantages would be +-.935413 by reward alone."""
    rewards = {"guided": [1.0, 1.0, 0.0, 1.0], "free": [0.0, 0.0, 1.0, 0.0]}
    samples = [plain(f"a/{kind}/{i}", r) for kind, own in rewards.items() for i, r in enumerate(own)]
    view = view_of([replace(s, cohort=s.id.rpartition("/")[0]) for s in samples], RANK, 8)
    mean, scaled = c.Credit((c.center(),)), c.Credit((c.center(), c.scale(eps=1e-6, ddof=1)))
    first = [x.update(v, x.init())[0][::2].tolist() for x, v in ((mean, view), (scaled, view), (scaled, view_of(samples, RANK, 8)))]
    assert first[0] == [0.25, 0.25, -0.75, 0.25, -0.25, -0.25, 0.75, -0.25]
    assert first[1] == pytest.approx([0.499999, 0.499999, -1.499997, 0.499999, -0.499999, -0.499999, 1.499997, -0.499999], abs=1e-6)
    assert [abs(x) for x in first[2]] == pytest.approx([0.935413] * 8, abs=1e-6)
