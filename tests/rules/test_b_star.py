"""B-STaR: the specification's balance scores and pass metrics, limits, the selection, and the controller through steps of a scripted engine."""

import asyncio
import json
from itertools import combinations, pairwise, product
from random import Random

import pytest
import torch

from llmrl.batch import Outputs, evaluate_terms, global_denominators, pack
from llmrl.chat import Chat, char_tokenizer
from llmrl.data import PromptStream
from llmrl.engine import TableEngine
from llmrl.memory import Memory
from llmrl.records import Prompt, Sample, Sampling, Verdict
from llmrl.rollout import RolloutIO
from llmrl.rules.b_star import TEMPERATURES, b_star, balance, best_of, chosen, form, pass_at_least, tally
from llmrl.step import drop_stale
from tests.builders import ALPHABET

COUNTS = {(10, 12): 0.833333, (4, 4): 0.5, (4, 8): 0.25, (0, 3): 0.0, (0, 0): 0.0}


def samples(*said):
    """(text, score) pairs."""
    return [Sample(f"p/{i}", "p", [1], [4], None, 0, text=text, reward=score) for i, (text, score) in enumerate(said)]


def test_worked_balance_scores():
    assert {k: balance(*k, 8) for k in COUNTS} == pytest.approx(COUNTS, abs=1e-6)
    assert [balance(*k, 8) for k in ((8, 8), (16, 32), (16, 16), (1, 1))] == [1.0, 0.5, 1.0, 0.125]
    memory = Memory()
    for name, value in (("balance", sum(balance(*k, 8) for k in COUNTS)), ("answered", sum(n > 0 for _, n in COUNTS))):
        memory.track(f"b_star/{name}/1/0.5", value, len(COUNTS), decay=0.0)
    memory.end_step()
    mean, answered = memory.average("b_star/balance/1/0.5"), memory.average("b_star/answered/1/0.5")
    assert mean == pytest.approx(0.316667, abs=1e-6) and mean / answered == pytest.approx(0.395833, abs=1e-6)


def test_worked_pass_metrics():
    assert pass_at_least(8, 2, 4) == pytest.approx(0.785714, abs=1e-6) and pass_at_least(8, 2, 4, 2) == pytest.approx(0.214286, abs=1e-6)
    assert (pass_at_least(8, 5, 4, 4), pass_at_least(8, 5, 4), pass_at_least(8, 4, 4, 4)) == pytest.approx((0.071429, 1.0, 0.014286), abs=1e-6)


def test_pass_metrics_count_subsets():
    for m, c in ((6, 0), (6, 2), (6, 6), (5, 3)):
        for k in range(1, m + 1):
            hits = [sum(i < c for i in chosen_) for chosen_ in combinations(range(m), k)]
            rates = [sum(h >= s for h in hits) / len(hits) for s in range(1, k + 1)]
            assert [pass_at_least(m, c, k, s) for s in range(1, k + 1)] == pytest.approx(rates) and rates == sorted(rates, reverse=True)
        assert pass_at_least(m, c, 1) == pytest.approx(c / m)


def test_limits_of_the_balance_score():
    for n, wanted in product(range(1, 12), (1, 4, 8)):
        for right in range(n + 1):
            b = balance(right, n, wanted)
            assert 0 <= b <= 1 and (b == 1) == (right >= wanted and right == n)
            assert b == pytest.approx(right**2 / (wanted * n) if right < wanted else right / n)
    assert balance(3, 4, 1) == 0.75 and balance(3, 4, 1e9) < 1e-8


def test_tally_and_selection():
    own = samples(("1+1=2 #2", 1.0), ("1+1=2   #2", 1.0), ("2#2", 1.0), ("9", 0.2), ("8", 0.0), ("7", None))
    assert tally(own, 0.5, 0.5, "text") == (2, 3) and tally(own, -1.0, 0.5, "text") == (2, 5) and tally(own, 1.0, 0.5, "text") == (0, 0)
    assert [s.id for s in best_of(own, 0.5, "text", 4)] == ["p/0", "p/2"] and [s.id for s in best_of(own, -1.0, "text", 3)] == ["p/0", "p/2", "p/3"]
    graded = samples(("a", 0.6), ("b", 0.9), ("a", 0.8), ("b", 0.7), ("c", 0.65))
    assert [s.id for s in best_of(graded, 0.5, "text", 2)] == ["p/1", "p/2"] and [s.id for s in best_of(graded, 0.5, "text", 1)] == ["p/1"]
    draw = Random(2)
    for _ in range(50):  # a higher threshold never adds
        some = samples(*((draw.choice("abc"), draw.random()) for _ in range(6)))
        counts = [tally(some, t, 0.5, "text") for t in (-1.0, 0.2, 0.6, 0.9)]
        assert all(a >= b for one, two in pairwise(counts) for a, b in zip(one, two, strict=True)) and all(a <= b for a, b in counts)


def test_forms():
    assert form(" 1 +\n2", "text") == "1 + 2" != form("1+2", "text")
    assert form("so 3-6 = -3; then -3-1=-4", "equations") == form("3-6=-3 and -3-1=-4.", "equations") != form("3-6=-3", "equations")
    assert form("3-6=-3;-3-1=-4#-4", "equations") == ("3-6=-3", "-3-1=-4") and form("first 3-6 = -3, so -3-1 = -4", "equations") == ("3-6=-3", "-3-1=-4")
    assert form("#7", "equations") == "#7"


def test_the_choice_and_its_ties():
    memory, grid = Memory(), [(t, h) for t in (0.5, 1.0) for h in (-1.0, 0.5)]

    def search(table):
        for (t, h), (total, answered) in table.items():
            memory.track(f"b_star/balance/{t:g}/{h:g}", total, 4, decay=0.0)
            memory.track(f"b_star/answered/{t:g}/{h:g}", answered, 4, decay=0.0)
        memory.end_step()

    assert chosen(memory, grid, empty_counts=False) is None
    search({(0.5, -1.0): (1.0, 4), (0.5, 0.5): (1.0, 1), (1.0, -1.0): (2.0, 4), (1.0, 0.5): (2.0, 3)})
    assert chosen(memory, grid, empty_counts=False) == (0.5, 0.5)  # 1.0 on the one prompt with anything kept
    assert chosen(memory, grid, empty_counts=True) == (1.0, -1.0)  # a tie: the lower threshold
    search(dict.fromkeys(grid, (2.0, 4)))
    assert chosen(memory, grid, empty_counts=False) == (0.5, -1.0)
    search(dict.fromkeys(grid, (0.0, 0)))
    assert chosen(memory, grid, empty_counts=False) == (0.5, -1.0)  # nothing kept anywhere is a score of 0, not the search before
    assert len(TEMPERATURES) == 15 and TEMPERATURES[0] == 0.5 and TEMPERATURES[-1] == 1.2


# ---------------------------------------------------------------- through steps


class Right:
    """Texts with a 7 are right; "(" cannot be judged."""

    def score(self, items):
        return [Verdict(None, "timeout") if "(" in t else Verdict(float("7" in t)) for _, t in items]


ROWS = [Prompt(f"p{i}", ({"role": "user", "content": f"{i}="},), "7") for i in range(4)]


def say(r):
    """Cold: always the same right text. At 1: different ones, all right. Hot: mostly wrong."""
    i = int(r.seed[-1])
    return {0.5: "7", 1.0: f"7{i}", 1.5: f"7{i}" if i == 0 else "(" if i == 1 else f"{i % 3}"}[r.sampling.temperature]


def run(rule, steps, ranks=1, memories=None, temperature=1.5):
    """-> (groups of each step in the order of the data, last step's metrics, memories)."""
    chat = Chat(char_tokenizer(ALPHABET))
    memories, told, io = memories or [Memory() for _ in range(ranks)], [], None
    for step in steps:
        groups = {}
        streams = [PromptStream(ROWS, seed=1, shuffle=False, rank=r, world=ranks) for r in range(ranks)]
        for stream, memory in zip(streams, memories, strict=True):
            everyone = stream.coming(4)
            io = RolloutIO(TableEngine(chat, say), Right(), chat, memory, Sampling(4, temperature), 4, (0, step), step_prompts=everyone)
            groups |= {g.prompt.id: g for g in asyncio.run(rule.collect(stream.take(4 // ranks), io))}
        new = [(m._new, m._caps, m._tracked) for m in memories]
        for memory in memories:
            memory.end_step(lambda _, new=new: new)
        told.append([groups[p.id] for p in ROWS])
    return told, io.noted, memories


GRID = {"temperatures": (1.5, 0.5, 1.0), "every": 2}


def test_the_controller_rules_from_the_next_step_on():
    told, noted, _ = run(b_star(**GRID), (1, 2))
    assert [s.text for s in told[0][0].samples] == ["70", "(", "2", "0"] and [s.weights["kept"] for s in told[0][0].samples] == [1, 0, 0, 0]
    assert all(s.behavior_logp is not None for s in told[0][0].samples)  # the recipe's own temperature
    assert [s.text for s in told[1][2].samples] == ["70", "71", "72", "73"] and [s.weights["kept"] for s in told[1][2].samples] == [1, 1, 0, 0]
    assert all(s.behavior_logp is None and s.verdict.score == 1 for g in told[1] for s in g.samples)
    assert (noted["rule/temperature"], noted["rule/threshold"], noted["rule/kept"]) == ([4.0, 4], [-4.0, 4], [8.0, 4])
    assert (noted["rule/balance"], noted["rule/diversity"]) == ([4.0, 4], [4.0, 4]) and noted["rule/pass@2-2"] == [4.0, 4]


def test_metrics_of_a_step():
    _, noted, _ = run(b_star(every=9, temperatures=(0.5,), wanted=1, pass_k=3), (1,))
    assert noted["rule/balance_all"] == [4.0, 4] == noted["rule/balance"]  # one right sample kept of one wanted
    assert noted["rule/pass@3"] == [4.0, 4] and noted["rule/pass@3-2"] == [0.0, 4]
    _, noted, _ = run(b_star(every=9, temperatures=(1.5,)), (1,), temperature=0.5)
    assert noted["rule/diversity"] == [1.0, 4] and noted["rule/balance"] == pytest.approx([4 * 0.5 * 0.25, 4])


def test_the_search_does_not_depend_on_the_ranks_and_survives_json():
    rule = b_star(**GRID, dev_prompts=3)
    one, _, (memory,) = run(rule, (1, 2, 3))
    two, _, (first, second) = run(rule, (1, 2, 3), ranks=2)
    assert memory.state_dict()["averages"] == pytest.approx(first.state_dict()["averages"]) and first.state_dict() == second.state_dict()
    assert [[[s.text for s in g.samples] for g in step] for step in one] == [[[s.text for s in g.samples] for g in step] for step in two]
    again = Memory()
    again.load_state_dict(json.loads(json.dumps(run(rule, (1,))[2][0].state_dict())))
    rest, _, (after,) = run(rule, (2, 3), memories=[again])
    assert [[s.token_ids for g in step for s in g.samples] for step in rest] == [[s.token_ids for g in step for s in g.samples] for step in one[1:]]
    assert after.state_dict() == memory.state_dict()


def test_searches_come_every_so_many_steps_on_the_dev_prompts():
    asked = []
    rule = b_star(**GRID, dev_prompts=1, dev_samples=2)
    chat, memory = Chat(char_tokenizer(ALPHABET)), Memory()
    for step in (1, 2, 3):
        engine = TableEngine(chat, lambda r: asked.append((r.seed[2], r.sampling.temperature)) or say(r))
        io = RolloutIO(engine, Right(), chat, memory, Sampling(4), 4, (0, step))
        asyncio.run(rule.collect(ROWS, io))
        memory.end_step()
        searched = [a for a in asked if a[1] != 1.0]
        assert searched == ([("p0", 0.5)] * 2 + [("p0", 1.5)] * 2 if step != 2 else []) and len(asked) == 16 + (6 if step != 2 else 0)
        asked.clear()


def test_the_loss_is_that_of_what_is_kept_and_no_alarm_looks_at_it():
    rule = b_star(**GRID)
    told, _, _ = run(rule, (1, 2))
    own = [s for g in told[1] for s in g.samples]
    assert drop_stale(own, 7, 0) == {"samples/staleness_updates": 0.0, "samples/stale": 0.0}
    logp = {s.id: torch.full((len(s.token_ids),), -0.1 * (k + 1), dtype=torch.float64, requires_grad=True) for k, s in enumerate(own)}
    total = 0.0
    denominators = global_denominators(own, rule.loss, max_new_tokens=4)
    for batch in pack(own, [torch.zeros(len(s.token_ids)) for s in own], tokens=9):
        x = torch.cat([logp[own[i].id] for i in batch.sample_index])
        loss, _ = evaluate_terms(rule.loss, batch, Outputs(x, x.detach()), denominators)
        loss.backward()
        total += float(loss.detach())
    kept = [s for s in own if s.weights["kept"]]
    tokens = sum(len(s.token_ids) for s in kept)
    assert total == pytest.approx(-sum(float(logp[s.id].detach().sum()) for s in kept) / tokens) and len(kept) == 8
    assert all(bool((logp[s.id].grad != 0).all()) == (s in kept) for s in own if logp[s.id].grad is not None)
    assert logp[kept[0].id].grad.tolist() == pytest.approx([-1 / tokens] * len(kept[0].token_ids))


def test_keys_are_checked():
    for keys in ({"every": 0}, {"temperatures": ()}, {"temperatures": (0.0,)}, {"thresholds": ()}, {"wanted": -1}, {"pass_s": 0}):
        with pytest.raises(ValueError, match="b_star"):
            b_star(**keys)
