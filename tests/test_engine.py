"""The engines: what is sampled, with which log-prob, and what is computed for it. The oracle is the model's own eager attention."""

import copy
import itertools
import random

import numpy as np
import pytest
import torch
from torch import nn

from llmrl.batch import Outputs, pack
from llmrl.chat import Chat, char_tokenizer
from llmrl.engine import TableEngine, draw, truncate_logits
from llmrl.hf_engine import HFEngine, hf, prefill_parts
from llmrl.learner import Learner
from llmrl.records import Completion, InputError, Request, Sample, Sampling
from llmrl.rollout import philox
from llmrl.rules.base import Needs
from tests.builders import ALPHABET, tiny_policy

torch.set_num_threads(1)
EOS = 2
CONTEXTS = [(1, 5, 14, 7), (1, 9), (1, 4, 4, 14, 15, 6, 18, 7, 7, 9, 11), (1, 12, 15, 5, 18, 10)]
CUTS = [
    Sampling(24),
    Sampling(24, temperature=0.7),
    Sampling(24, top_k=5),
    Sampling(24, top_p=0.8),
    Sampling(24, min_p=0.2),
    Sampling(24, temperature=1.3, top_k=9, top_p=0.9, min_p=0.05),
]


def sharp(bias=None, **shape):
    """A tiny model whose distributions are neither flat nor certain, with a head bias (id -> value) where asked for."""
    policy = tiny_policy(**shape)
    with torch.no_grad():
        for p in policy.model.parameters():
            if p.dim() == 2:
                p.mul_(3.0)
        head = policy.model.lm_head
        head.weight.mul_(4.0)
        if bias is not None:
            head.bias = nn.Parameter(torch.zeros(len(head.weight)))
            for i, value in bias.items():
                head.bias[i] = value
    return policy


@pytest.fixture(scope="module")
def policy():
    return sharp()


def eager_logits(policy, context, tokens):
    """fp64 [n, V]: logits before each of `tokens`, by a plain forward of a copy of the model over one sequence."""
    model = copy.deepcopy(policy.model)
    model.set_attn_implementation("eager")
    model.eval()
    with torch.no_grad():
        logits = model(torch.tensor([[*context, *tokens]])).logits[0, len(context) - 1 : -1].double()
    logits[:, list(policy.banned_ids)] = -torch.inf
    return logits


def cut_logp(logits_V, how):
    """Log-probs of the cut, renormalised distribution, with a sorted list instead of masks: temperature, top-k, min-p, top-p."""
    p = np.exp(logits_V / how.temperature - np.max(logits_V / how.temperature))
    p /= p.sum()
    ranked = sorted(range(len(p)), key=lambda i: -p[i])
    if how.top_k:
        ranked = ranked[: how.top_k]
    ranked = [i for i in ranked if p[i] >= how.min_p * p[ranked[0]]]
    kept, mass, total = [], 0.0, sum(p[i] for i in ranked)
    for i in ranked:
        if mass >= how.top_p:
            break
        kept.append(i)
        mass += p[i] / total
    out = np.full(len(p), -np.inf)
    with np.errstate(divide="ignore"):  # banned ids may be kept where nothing is cut
        out[kept] = np.log(p[kept] / p[kept].sum())
    return out


def requests(n, how=CUTS[0], contexts=CONTEXTS, name="r"):
    return [Request(contexts[i % len(contexts)], (0, 1, name, i), how) for i in range(n)]


def count_forwards(policy):
    """The number of tokens of every forward to come, prefills and decoding steps apart."""
    seen = {"PrefillPlan": [], "DecodePlan": []}
    inner = policy.hidden

    def hidden(ids, positions, plan):
        seen[type(plan).__name__].append(len(ids))
        return inner(ids, positions, plan)

    policy.hidden = hidden
    return seen


# ---------------------------------------------------------------- log-probs


@pytest.mark.parametrize("how", CUTS, ids=lambda h: f"t{h.temperature}k{h.top_k}p{h.top_p}m{h.min_p}")
def test_logprobs_are_those_of_the_distribution_that_was_sampled(policy, how):
    asked = requests(12, how)
    done = HFEngine(policy, rows=5).generate(asked)
    seen = 0
    for r, c in zip(asked, done, strict=True):
        logits = eager_logits(policy, r.context_ids, c.token_ids).numpy()
        want = [cut_logp(row, how)[t] for row, t in zip(logits, c.token_ids, strict=True)]
        assert c.logprobs == pytest.approx(want, abs=1e-4)
        seen += len(want)
    assert seen > 60 and len({t for c in done for t in c.token_ids}) > 8  # neither empty nor all the same


def test_grouped_query_attention_and_a_wide_batch():
    """One key head for four query heads; contexts of 1 to 60 tokens in one prefill."""
    policy = sharp(kv_heads=1)
    rng = random.Random(0)
    contexts = [(1, *(rng.randrange(4, 23) for _ in range(n))) for n in (0, 1, 2, 59, 17, 33)]
    asked = requests(24, Sampling(16), contexts)
    for r, c in zip(asked, HFEngine(policy).generate(asked), strict=True):
        logp = eager_logits(policy, r.context_ids, c.token_ids).log_softmax(-1)
        assert c.logprobs == pytest.approx([float(logp[k, t]) for k, t in enumerate(c.token_ids)], abs=1e-4)


def test_greedy_is_the_argmax_of_the_eager_model(policy):
    asked = requests(8, Sampling(20, temperature=0.0, top_p=0.5))
    for r, c in zip(asked, HFEngine(policy, rows=3).generate(asked), strict=True):
        assert c.token_ids == eager_logits(policy, r.context_ids, c.token_ids).argmax(-1).tolist()
        assert c.logprobs == [0.0] * len(c.token_ids)


# ---------------------------------------------------------------- the random stream belongs to the request


def same(a, b):
    assert [c.token_ids for c in a] == [c.token_ids for c in b]
    assert [c.finish for c in a] == [c.finish for c in b]
    for x, y in zip(a, b, strict=True):
        assert x.logprobs == pytest.approx(y.logprobs, abs=1e-4)


def test_the_batch_does_not_change_a_completion(policy):
    asked = requests(16)
    whole = HFEngine(policy, rows=16).generate(asked)
    assert len({tuple(c.token_ids) for c in whole}) == 16
    for rows in (1, 3):
        same(HFEngine(policy, rows=rows).generate(asked), whole)
    engine = HFEngine(policy, rows=16)
    for n in (1, 3):
        same([c for k in range(0, 16, n) for c in engine.generate(asked[k : k + n])], whole)
    order = random.Random(1).sample(range(16), 16)
    shuffled = HFEngine(policy, rows=5).generate([asked[i] for i in order])
    same(shuffled, [whole[i] for i in order])


def test_other_requests_in_the_batch_do_not_change_a_completion(policy):
    asked = requests(16)
    whole = HFEngine(policy).generate(asked)
    others = [r for k, how in enumerate(CUTS) for r in requests(4, how, [(1, 4 + k), *CONTEXTS[:2]], f"other{k}")]
    others += requests(4, Sampling(7, temperature=0.0))
    mixed = [r for pair in itertools.zip_longest(others, asked) for r in pair if r is not None]
    done = HFEngine(policy, rows=6).generate(mixed)
    same([c for r, c in zip(mixed, done, strict=True) if r in asked], whole)


def test_the_same_seed_twice_and_another_seed(policy):
    a, b, c = HFEngine(policy).generate([Request(CONTEXTS[0], seed, CUTS[0]) for seed in [(0, 1, "p", 0), (0, 1, "p", 0), (0, 2, "p", 0)]])
    assert a.token_ids == b.token_ids and a.token_ids != c.token_ids


def test_a_cache_that_was_used_before_leaves_no_trace(policy):
    """Long rows first: what they leave behind in the cache must not be attended to."""
    asked = requests(9, Sampling(12))
    fresh = HFEngine(policy, rows=4).generate(asked)
    engine = HFEngine(policy, rows=4)
    engine.generate(requests(8, Sampling(200), name="long"))
    same(engine.generate(asked), fresh)
    engine.release()
    same(engine.generate(asked), fresh)
    same(HFEngine(policy, rows=4, cache_gb=1e-9).generate(asked), fresh)  # room for one row only


def test_generation_follows_the_weights_and_keeps_the_mode(policy):
    policy = sharp()
    engine = hf(rows=4)(policy)
    asked = requests(4, Sampling(12))
    policy.model.train()
    before = engine.generate(asked)
    assert policy.model.training
    with torch.no_grad():
        policy.model.lm_head.weight.add_(0.5 * torch.randn(policy.model.lm_head.weight.shape, generator=torch.Generator().manual_seed(0)))
    engine.load_weights(7, None)
    after = engine.generate(asked)
    assert [c.policy_version for c in before + after] == [0] * 4 + [7] * 4
    for r, c in zip(asked, after, strict=True):
        logp = eager_logits(policy, r.context_ids, c.token_ids).log_softmax(-1)
        assert c.logprobs == pytest.approx([float(logp[k, t]) for k, t in enumerate(c.token_ids)], abs=1e-4)


# ---------------------------------------------------------------- what is computed


@pytest.mark.parametrize("rows", [1, 4, 64])
def test_contexts_are_prefilled_once_and_nothing_is_computed_for_the_finished(rows):
    policy = sharp({EOS: 2.0})
    seen = count_forwards(policy)
    asked = requests(24)
    done = HFEngine(policy, rows=rows).generate(asked)
    assert len({len(c.token_ids) for c in done}) > 4
    beginnings = {c[:k] for c in CONTEXTS for k in range(1, len(c) + 1)}
    assert sum(seen["PrefillPlan"]) <= sum(map(len, CONTEXTS)) and (rows < 24 or sum(seen["PrefillPlan"]) == len(beginnings))  # six completions a context
    assert sum(seen["DecodePlan"]) == sum(len(c.token_ids) - 1 for c in done)
    assert max(seen["DecodePlan"]) <= rows


def test_a_shared_beginning_is_computed_once_and_changes_nothing():
    """Corrupted continuations of one solution: 40 shared tokens, then 2 to 4 of their own; and the scores of the same texts."""
    policy = sharp({EOS: 1.0})
    shared = tuple(4 + (7 * k) % 15 for k in range(40))
    contexts = [(*shared, *([5 + i] * (2 + i % 3))) for i in range(6)]
    asked = [Request(c, (i, j), Sampling(12)) for i, c in enumerate(contexts) for j in range(3)]
    seen = count_forwards(policy)
    engine = HFEngine(policy)
    together = engine.generate(asked)
    assert sum(seen["PrefillPlan"]) == 40 + sum(len(c) - 40 for c in contexts)
    alone = [HFEngine(policy).generate([r])[0] for r in asked]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    seen["PackPlan"] = []
    scored = engine.score([(r.context_ids, c.token_ids) for r, c in zip(asked, together, strict=True)])
    for c, d, s in zip(together, alone, scored, strict=True):
        assert max(abs(a - b) for a, b in zip(c.logprobs, d.logprobs, strict=True)) < 1e-5
        assert max(abs(a - b) for a, b in zip(c.logprobs, s, strict=True)) < 1e-5  # what is scored is what was sampled from
    assert engine.score([((5, 6), ()), ((5,), (6, 7))])[0] == [] and len(engine.score([((5, 6), ()), ((5,), (6, 7))])[1]) == 2


def test_prefill_parts_keep_their_bounds():
    long = [tuple(range(k, k + 3000)) for k in range(3)]
    assert prefill_parts([long[1], long[0]]) == [[long[0]], [long[1]]]  # 6000 tokens do not fit together
    twins = [(*long[0], k) for k in range(8)]
    assert [len(p) for p in prefill_parts(twins)] == [5, 3]  # 3008 tokens, but 8 rows of 3001 places


def test_waiting_requests_take_the_rows_of_the_finished():
    """Four rows; three long completions among nine short ones end together, not one after the other."""
    policy = sharp({EOS: -100.0})
    seen = count_forwards(policy)
    lengths = [20, 2, 2, 2] * 3
    done = HFEngine(policy, rows=4).generate([Request(CONTEXTS[i % 4], (i,), Sampling(n)) for i, n in enumerate(lengths)])
    assert [len(c.token_ids) for c in done] == lengths and {c.finish for c in done} == {"length"}
    assert len(seen["DecodePlan"]) <= 24  # batch after batch it would be 3 * 19


# ---------------------------------------------------------------- endings


def test_end_token_and_length_limit():
    policy = sharp({EOS: 1.5})
    done = HFEngine(policy).generate(requests(40, Sampling(10)))
    for c in done:
        assert c.finish == ("stop" if c.token_ids[-1] == EOS else "length")
        assert EOS not in c.token_ids[:-1] and (c.finish == "stop" or len(c.token_ids) == 10) and len(c.logprobs) == len(c.token_ids)
        assert c.text == policy.chat.text(c.token_ids) and "<" not in c.text
    assert {c.finish for c in done} == {"stop", "length"}


def test_an_end_token_in_the_context_ends_nothing():
    policy = sharp({EOS: -100.0})
    (c,) = HFEngine(policy).generate([Request((1, 5, EOS), (0,), Sampling(6))])
    assert len(c.token_ids) == 6 and c.finish == "length"


@pytest.mark.parametrize("stop", [("7",), ("7", "2"), ("12", "45", "6;", "00", "31", "88", "9+", "()"), ("1234567890",)])
def test_stop_strings(stop):
    """A completion is the unstopped one up to where one of the texts first appears, that text included."""
    policy = sharp({EOS: -100.0, 3: -100.0})  # no end token, no unknown character: one token a character
    free = HFEngine(policy).generate(requests(24, Sampling(30)))
    cut = HFEngine(policy, rows=5).generate(requests(24, Sampling(30, stop=stop)))
    for a, b in zip(free, cut, strict=True):
        ends = [a.text.index(s) + len(s) for s in stop if s in a.text]
        assert b.token_ids == a.token_ids[: min(ends, default=30)] and b.text == a.text[: min(ends, default=30)]
        assert b.finish == ("stop" if ends else "length")
    assert (any(c.finish == "stop" for c in cut)) == (len(stop[0]) < 10)


def test_a_stop_text_at_the_limit_is_a_stop():
    policy = sharp({EOS: -100.0, ALPHABET.index("#") + 4: 100.0})
    (c,) = HFEngine(policy).generate([Request(CONTEXTS[0], (0,), Sampling(2, stop=("##",)))])
    assert (c.text, c.finish) == ("##", "stop")
    (c,) = HFEngine(policy).generate([Request((1, 4, ALPHABET.index("#") + 4), (0,), Sampling(2, stop=("###",)))])
    assert (c.text, c.finish) == ("##", "length")  # the context's # is not part of the completion


# ---------------------------------------------------------------- tokens that can never be sampled


@pytest.mark.parametrize(
    "how", [Sampling(12), Sampling(12, temperature=0.7), Sampling(12, temperature=0.0), Sampling(12, top_k=2), Sampling(12, top_p=0.5)]
)
def test_padding_and_begin_tokens_are_never_sampled(how):
    """The model puts all its mass on them; learner and engine agree on the distribution over the rest."""
    from accelerate import Accelerator

    policy = sharp({0: 60.0, 1: 80.0, 3: 70.0})
    assert policy.banned_ids == (0, 1, 3)
    asked = requests(12, how)
    done = HFEngine(policy, rows=5).generate(asked)
    assert not {0, 1, 3} & {t for c in done for t in c.token_ids}
    for r, c in zip(asked, done, strict=True):
        logits = eager_logits(policy, r.context_ids, c.token_ids).numpy()
        if how.temperature:
            assert c.logprobs == pytest.approx([cut_logp(row, how)[t] for row, t in zip(logits, c.token_ids, strict=True)], abs=1e-4)
    if how.temperature and not how.top_k and how.top_p == 1:
        samples = [
            Sample(str(i), str(r.context_ids), list(r.context_ids), c.token_ids, c.logprobs, 0)
            for i, (r, c) in enumerate(zip(asked, done, strict=True))
        ]
        learner = Learner(policy, Accelerator(cpu=True), temperature=how.temperature)
        (batch,) = pack(samples, [torch.ones(len(s.token_ids)) for s in samples], tokens=10**6)
        out = learner.forward(batch, Needs())
        assert isinstance(out, Outputs)
        rho = (out.logp_T.detach() - batch.behavior_logp_T).exp()
        assert float((rho - 1).abs().max()) < 1e-5
        assert float(batch.behavior_logp_T.min()) > -20  # not minus 60: they are outside the softmax


def test_padding_that_is_also_the_end_token_can_be_sampled():
    from llmrl.models import _stop_ids

    policy = sharp({EOS: 100.0})
    policy.chat.tokenizer.pad_token = "<eos>"
    assert policy.chat.tokenizer.pad_token_id in _stop_ids(policy.model, policy.chat.tokenizer)
    (c,) = HFEngine(policy).generate([Request(CONTEXTS[0], (0,), Sampling(5))])
    assert (c.token_ids, c.finish, c.text) == ([EOS], "stop", "")


# ---------------------------------------------------------------- draw

CHI2_999 = {19: 43.82}
"""99.9 % quantile of the chi-square distribution by degrees of freedom."""


def chi_square(tokens, p_V):
    """Statistic of counts against expectations, all expectations being at least 5."""
    counts = np.bincount(tokens, minlength=len(p_V))
    assert counts[p_V == 0].sum() == 0
    keep = p_V > 0
    expected = p_V[keep] * len(tokens)
    assert expected.min() >= 5
    return float(((counts[keep] - expected) ** 2 / expected).sum()), int(keep.sum()) - 1


def test_twenty_thousand_draws_follow_the_softmax():
    policy = tiny_policy()  # an untrained model: no token is rare
    done = HFEngine(policy, rows=2048).generate([Request(CONTEXTS[2], ("chi", i), Sampling(1)) for i in range(20_000)])
    p = eager_logits(policy, CONTEXTS[2], [4]).softmax(-1)[0].numpy()
    statistic, freedom = chi_square([c.token_ids[0] for c in done], p)
    assert freedom == 19 and statistic < CHI2_999[19]
    share = np.mean([c.logprobs[0] for c in done])
    assert share == pytest.approx(float((p[p > 0] * np.log(p[p > 0])).sum()), abs=0.01)  # mean log-prob = -entropy


def test_draws_of_a_peaked_distribution_follow_it():
    p = np.array([0.3, 0.0, 1e-3, 0.2, 0.0, 0.4, 0.05, 0.049, 0.0])
    logits = torch.tensor(np.log(p, where=p > 0, out=np.full(9, -np.inf)), dtype=torch.float32).expand(20_000, -1)
    token, logp = draw(logits, Sampling(1), torch.tensor(philox(("draw",)).random(20_000)))
    statistic, freedom = chi_square(token.numpy(), p)
    assert freedom == 5 and statistic < 20.52  # 99.9 %
    assert torch.allclose(logp, torch.tensor(np.log(p[token.numpy()]), dtype=torch.float32), atol=1e-6)


def test_draw_at_the_ends():
    ninf = -torch.inf
    logits = torch.tensor(
        [[ninf, 0.0, ninf, 0.0, ninf], [ninf, ninf, 5.0, ninf, ninf], [0.0, -90.0, -1e4, ninf, ninf], [1e4, ninf, -1e4, 0.0, 1e4]]
    )
    for u, want in [
        (0.0, [1, 2, 0, 0]),
        (0.4999, [1, 2, 0, 0]),
        (0.5001, [3, 2, 0, 4]),
        (1 - 2**-53, [3, 2, 0, 4]),
        (1 - 2**-24, [3, 2, 0, 4]),
    ]:
        token, logp = draw(logits, Sampling(1), torch.full((4,), u, dtype=torch.float64))
        assert token.tolist() == want, u
        assert logp.isfinite().all()
    assert logp.tolist() == pytest.approx([-0.6931472, 0.0, 0.0, -0.6931472])


def test_a_token_without_probability_is_never_drawn():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 300, generator=g) * 30
    logits[torch.rand(64, 300, generator=g) < 0.5] = -torch.inf
    for u in (0.0, 1e-300, 1e-9, 0.3, 0.999999, 1 - 2**-25, 1 - 2**-53):
        token, logp = draw(logits, Sampling(1), torch.full((64,), u, dtype=torch.float64))
        assert logits.gather(1, token[:, None]).isfinite().all() and logp.isfinite().all()


def test_a_row_is_drawn_by_its_own_number():
    g = torch.Generator().manual_seed(0)
    logits, u = torch.randn(20, 50, generator=g), torch.rand(20, dtype=torch.float64, generator=g)
    token, logp = draw(logits, CUTS[-1], u)
    order = torch.randperm(20, generator=g)
    again, logp_again = draw(logits[order], CUTS[-1], u[order])
    assert again.tolist() == token[order].tolist() and torch.equal(logp_again, logp[order])
    assert [int(draw(logits[i : i + 1], CUTS[-1], u[i : i + 1])[0]) for i in range(20)] == token.tolist()


@pytest.mark.parametrize(
    ("how", "kept"),
    [
        ({"top_k": 1}, [0]),
        ({"top_k": 3}, [0, 1, 2]),
        ({"top_k": 99}, [0, 1, 2, 3]),
        ({"top_p": 0.4}, [0]),
        ({"top_p": 0.55}, [0, 1]),
        ({"top_p": 0.85}, [0, 1, 2]),
        ({"min_p": 0.5}, [0, 1]),
        ({"min_p": 0.35}, [0, 1, 2]),
        ({"min_p": 0.9}, [0]),
        ({"top_k": 3, "top_p": 0.8}, [0, 1]),  # 0.5, 0.3, 0.2 of what top-k leaves, times 0.95: 0.526 + 0.316 >= 0.8
        ({"temperature": 0.5, "top_p": 0.7}, [0, 1]),  # 0.641, 0.231, 0.103, 0.026
    ],
    ids=str,
)
def test_cuts_by_hand(how, kept):
    """p = 0.5, 0.3, 0.2, 0.1 out of 1.1 (0.4545, 0.2727, 0.1818, 0.0909), in another order and once more reversed."""
    p = torch.tensor([0.5, 0.3, 0.2, 0.1])
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        x = truncate_logits(p[order].log()[None], Sampling(1, **how))
        assert sorted(order[i] for i in x[0].isfinite().nonzero()[:, 0].tolist()) == kept
        left = p ** (1 / how.get("temperature", 1.0))
        q = x.softmax(-1)[0]
        assert torch.allclose(q, torch.tensor([float(left[i] / left[kept].sum()) if i in kept else 0.0 for i in order]), atol=1e-6)


def test_truncation_leaves_its_argument_alone():
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    draw(logits, CUTS[-1], torch.tensor([0.5], dtype=torch.float64))
    assert logits.tolist() == [[1.0, 2.0, 3.0]]


# ---------------------------------------------------------------- refusals


def test_too_long_a_context_is_refused(policy):
    engine = HFEngine(policy)
    assert engine.max_length == 256
    ok = Request((1,) * 250, (0,), Sampling(6))
    assert len(engine.generate([ok])) == 1
    with pytest.raises(InputError, match=r"context of 251 tokens and max_new_tokens = 6 exceed the model's 256 positions: lower"):
        engine.generate([ok, Request((1,) * 251, (0,), Sampling(6))])


def test_an_empty_context_is_refused(policy):
    with pytest.raises(InputError, match="empty context"):
        HFEngine(policy).generate([Request(CONTEXTS[0], (0,), Sampling(4)), Request((), (1,), Sampling(4))])


def test_settings_are_checked_and_nothing_asked_is_nothing_done(policy):
    assert HFEngine(policy).generate([]) == []
    for bad in ({"rows": 0}, {"cache_gb": 0.0}):
        with pytest.raises(InputError, match="must be positive"):
            hf(**bad)


# ---------------------------------------------------------------- TableEngine


def test_table_engine_answers_from_its_script():
    chat = Chat(char_tokenizer(ALPHABET))
    engine = TableEngine(chat, lambda r: "12#3" if r.seed[0] == "a" else [5, 6, EOS], logp=-0.25)
    ask = [Request((1, 4), ("a",), Sampling(8)), Request((1, 4), ("b",), Sampling(8)), Request((1, 4), ("a",), Sampling(3))]
    engine.load_weights(4, None)
    said = engine.generate(ask)
    assert said[0] == Completion([5, 6, ALPHABET.index("#") + 4, 7, EOS], [-0.25] * 5, "stop", 4, "12#3")
    assert (said[1].text, said[1].token_ids) == ("12", [5, 6, EOS])
    assert (said[2].text, said[2].finish, len(said[2].logprobs)) == ("12#", "length", 3)
