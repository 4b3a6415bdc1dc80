"""Credit transforms against exact fractions and a hand-worked table, and what must not change an advantage."""

import json
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from llmrl import credit as c
from llmrl.segment import seg_sum
from tests.builders import flat, goldens, make_credit, make_view

REPO = Path(__file__).parents[1]
CHAINS = {
    "grpo": c.Credit((c.center(), c.scale())), "dr_grpo": c.Credit((c.center(),)), "rloo": c.Credit((c.rloo(),)),
    "batch": c.Credit((c.center(), c.scale_batch())), "reinforce_pp": c.Credit((), (c.whiten(),)),
    "dapo": c.Credit((c.overlong(cache=2), c.center(), c.scale())),
    "kl": c.Credit((c.kl_in_reward(coef=0.1), c.rloo()), (c.kl_to_go(coef=0.1), c.whiten())),
}  # fmt: skip


def run(chain, view):
    adv, state = chain.update(view, chain.init())
    assert adv.dtype == torch.float64 and adv.shape == view.sample_T.shape
    assert all(s == {} for s in state.values())
    return adv


def random_view(seed, groups=5, size=4, unscored=True):
    """Ragged samples in interleaved cohorts; some rewards missing."""
    g = torch.Generator().manual_seed(seed)
    n = groups * size
    rewards = [round(float(r), 3) for r in torch.rand(n, generator=g)]
    if unscored:
        rewards[3] = rewards[7] = None
    lengths = torch.randint(1, 6, (n,), generator=g).tolist()
    streams = {k: [[-float(x) for x in torch.rand(m, generator=g)] for m in lengths] for k in ("old_logp", "ref_logp")}
    return make_view(rewards, [i % groups for i in range(n)], lengths, max_new_tokens=5, streams=streams)


def permuted(view, order):
    """The same samples in another order (tokens move with them)."""
    parts = [torch.nonzero(view.sample_T == i)[:, 0] for i in order]
    tokens = torch.cat(parts)
    s = {k: getattr(view, k)[order] for k in ("reward_S", "scored_S", "cohort_S", "length_S", "truncated_S")}
    sample_T = torch.repeat_interleave(torch.arange(len(order)), s["length_S"])
    return replace(view, **s, sample_T=sample_T, streams={k: v[tokens] for k, v in view.streams.items()}), tokens


@pytest.mark.parametrize("entry", goldens("worked_credit", "credit"), ids=lambda e: f"{e['name']} [{e['source'][:12]}]")
def test_golden(entry):
    i = entry["inputs"]
    view = make_view(i["rewards"], i["cohorts"], i["lengths"], max_new_tokens=i.get("max_new_tokens", 0), streams=i.get("streams"))
    expected = entry["expected"]
    rows = expected.get("adv") or [[a] * n for a, n in zip(expected["adv_S"], i["lengths"], strict=True)]
    assert_close(run(make_credit(i["chain"]), view), flat(rows), atol=entry["tolerance"], rtol=0)


def test_golden_files_are_what_the_script_computes():
    subprocess.run([sys.executable, REPO / "scripts" / "make_goldens.py", "--check"], check=True)


def test_binary_group_closed_form():
    """p solved of 8: with ddof 0 and eps 0 the two values are sqrt((1-p)/p) and -sqrt(p/(1-p))."""
    chain = c.Credit((c.center(), c.scale(eps=0.0, ddof=0)))
    for solved in range(1, 8):
        p = solved / 8
        adv = run(chain, make_view([1] * solved + [0] * (8 - solved), [0] * 8))
        assert_close(adv, flat([[((1 - p) / p) ** 0.5] * solved + [-((p / (1 - p)) ** 0.5)] * (8 - solved)]))


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "batch"])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1 / 3])
def test_equal_rewards_give_exactly_zero(name, reward):
    view = make_view([reward] * 7 + [0.5, 0.25], [0] * 7 + [1, 1])
    assert run(CHAINS[name], view)[:7].tolist() == [0.0] * 7


def test_equal_rewards_reinforce_pp_is_not_zero():
    """No group baseline: a group that is always right is still better than the batch."""
    adv = run(CHAINS["reinforce_pp"], make_view([1, 1, 0, 0], [0, 0, 1, 1]))
    assert_close(adv, flat([[3**0.5 / 2, 3**0.5 / 2, -(3**0.5) / 2, -(3**0.5) / 2]]), atol=1e-7, rtol=0)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "batch"])
def test_sums_of_a_cohort_are_zero(name):
    view = random_view(1)
    adv_S = run(CHAINS[name], replace(view, length_S=torch.ones(20, dtype=torch.long), sample_T=torch.arange(20), streams={}))
    assert seg_sum(adv_S, view.cohort_S, 5).abs().max() < 1e-12


def test_rloo_is_center_times_n_over_n_minus_1():
    view = make_view([0.1, 0.7, 0.3, 0.9, 0.2], [0] * 5)
    assert_close(run(CHAINS["rloo"], view), run(CHAINS["dr_grpo"], view) * 5 / 4)


@pytest.mark.parametrize("name", list(CHAINS))
@pytest.mark.parametrize("seed", range(3))
def test_permuting_samples_and_renaming_cohorts_changes_nothing(name, seed):
    view = random_view(seed)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(seed))
    shuffled, tokens = permuted(view, order)
    adv = run(CHAINS[name], view)
    assert_close(run(CHAINS[name], shuffled), adv[tokens], atol=1e-12, rtol=0)
    assert_close(run(CHAINS[name], replace(view, cohort_S=torch.tensor([3, 0, 4, 1, 2])[view.cohort_S])), adv, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", list(CHAINS))
def test_unscored_samples_stay_out_and_end_at_zero(name):
    """Taking them out of the batch changes no other advantage, whatever lies in their streams."""
    view = random_view(2)
    gone = ~view.scored_S[view.sample_T]
    adv = run(CHAINS[name], view)
    assert adv[gone].tolist() == [0.0] * int(gone.sum())
    without, tokens = permuted(view, torch.nonzero(view.scored_S)[:, 0])
    assert_close(run(CHAINS[name], without), adv[tokens], atol=1e-12, rtol=0)
    holes = {k: torch.where(gone, torch.nan, v) for k, v in view.streams.items()}  # nobody computed log-probs for them
    assert_close(run(CHAINS[name], replace(view, streams=holes)), adv, atol=0, rtol=0)


def test_a_cohort_without_any_score_is_zero():
    view = make_view([None, None, 1.0, 0.0], [0, 0, 1, 1], [2, 1, 1, 1])
    for name in ("grpo", "rloo", "dr_grpo", "batch", "reinforce_pp"):
        adv = run(CHAINS[name], view)
        assert adv[:3].tolist() == [0.0] * 3 and adv.isfinite().all() and float(adv[3]) > 0 > float(adv[4])


@pytest.mark.parametrize("name", ["batch", "reinforce_pp", "kl", "grpo"])
def test_two_ranks_equal_one(name):
    """Whole groups on two ranks; the statistics that run over the batch are summed over both."""
    whole = random_view(3)
    got, places = [], []
    for side in (True, False):
        part, tokens = permuted(whole, torch.nonzero((whole.cohort_S < 2) == side)[:, 0])
        got.append(replace(part, cohort_S=part.cohort_S - part.cohort_S.min()))
        places.append(tokens)
    adv = run(CHAINS[name], whole)
    for mine, tokens in zip(lockstep(CHAINS[name], got), places, strict=True):
        assert_close(mine, adv[tokens], atol=1e-12, rtol=0)


def lockstep(chain, views):
    """Runs the chain on every view in threads that meet at each all_sum, as ranks do."""
    barrier = threading.Barrier(len(views), timeout=10)
    box, out = [torch.empty(0)] * len(views), [torch.empty(0)] * len(views)

    def rank(i):
        def all_sum(x):
            box[i] = x
            barrier.wait()
            total = torch.stack(box).sum(0)
            barrier.wait()
            return total

        out[i] = run(chain, replace(views[i], all_sum=all_sum))

    threads = [threading.Thread(target=rank, args=(i,)) for i in range(len(views))]
    for t in threads:
        t.start()
    for t in threads:
        t.join(20)
    return out


def running_mean(decay):
    """A stateful transform: subtracts a running mean of the batch's rewards, as REINFORCE with a moving baseline does."""

    def update(a, state, view):
        mean = float(a[view.scored_S].mean())
        base = mean if state["mean"] is None else decay * state["mean"] + (1 - decay) * mean
        return a - base, {"mean": base}

    return c.Transform("running_mean", lambda: {"mean": None}, update)


def test_stateful_transform():
    chain = c.Credit((running_mean(0.5), c.stateless("double", lambda a, view: 2 * a)))
    state = chain.init()
    assert state == {"running_mean": {"mean": None}, "double": {}}
    seen = []
    for rewards in ([1, 0], [1, 1], [0, 0]):
        before = json.dumps(state)
        adv, new = chain.update(make_view(rewards, [0, 0]), state)
        assert json.dumps(state) == before, "update is pure"
        state = json.loads(json.dumps(new))  # as a checkpoint does
        seen.append((adv.tolist(), state["running_mean"]["mean"]))
    assert seen == [([1.0, -1.0], 0.5), ([0.5, 0.5], 0.75), ([-0.75, -0.75], 0.375)]


def test_names_must_differ():
    with pytest.raises(ValueError, match="share a name"):
        c.Credit((c.center(), c.scale(), c.center()))


def test_missing_streams_are_named():
    for chain in (c.Credit((c.kl_in_reward(coef=0.1),)), c.Credit((), (c.kl_to_go(coef=0.1),))):
        with pytest.raises(ValueError, match=r"ref_logp.*Needs"):
            run(chain, make_view([1.0], [0], streams={"old_logp": [[-1.0]]}))
    with pytest.raises(ValueError, match="cache is 0"):
        c.overlong(cache=0)


def test_kl_is_zero_on_the_reference():
    """old = ref: k1 in the reward does nothing."""
    view = random_view(4)
    view = replace(view, streams={"old_logp": view.streams["old_logp"], "ref_logp": view.streams["old_logp"]})
    plain = c.Credit((c.rloo(),), (c.whiten(),))
    assert_close(run(CHAINS["kl"], view), run(plain, view), atol=1e-12, rtol=0)
