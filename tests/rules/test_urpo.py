"""URPO: the specification's referee outputs, what can be read of them, and the three kinds of rows on a scripted engine."""

import asyncio

import pytest

from llmrl.chat import Chat, char_tokenizer
from llmrl.engine import TableEngine
from llmrl.memory import Memory
from llmrl.plugins import use
from llmrl.records import InputError, Prompt, Sampling, Verdict
from llmrl.rollout import RolloutIO, sample_groups
from llmrl.rules.urpo import read_scores, tau
from tests.builders import ALPHABET, make_view

CHAT = Chat(char_tokenizer(ALPHABET + ":?\nabcxyz."))
G = [3, 2, 1]


def prompt(name, kind=None, **meta):
    return Prompt(name, ({"role": "user", "content": f"{name}+1="},), "2", ({"kind": kind} if kind else {}) | meta)


def rule_of(tmp_path, **keys):
    return use("urpo", {"template": "tiny", **keys}, home="llmrl.rules", base=tmp_path, where="[rule]")


class Run:
    """One collect. player(prompt id, i) -> answer; referee(shown texts, i) -> its output, i a sample's number or "referee"."""

    def __init__(self, tmp_path, prompts, *, player=None, referee=None, group=4, step=1, seed=0, **keys):
        self.asked, self.verified, self.requests = [], [], []

        def reply(r):
            text = CHAT.text(r.context_ids)
            self.requests.append(r)
            if not text.endswith("?"):
                return player(r.seed[2], int(r.seed[3]))
            shown = [line.partition(": ")[2] for line in text.split("\n")[1:-1]]
            self.asked.append((r.seed[2:], text))
            return referee(shown, r.seed[3])

        class Scores:
            def score(_, items):
                self.verified += [(p.id, text) for p, text in items]
                return [Verdict(float(text == "1")) for _, text in items]

        self.io = RolloutIO(TableEngine(CHAT, reply), Scores(), CHAT, Memory(), Sampling(60), group, (seed, step))
        self.rule = rule_of(tmp_path, **keys)
        self.groups = asyncio.run(self.rule.collect(prompts, self.io))

    def noted(self, name):
        total, n = self.io.noted[f"rule/{name}"]
        return total / n

    def rewards(self, k=0):
        return [s.reward for s in self.groups[k].samples]


def advantages(rule, rewards):
    return rule.credit.update(make_view(rewards, [0] * len(rewards)), rule.credit.init())[0].tolist()


def scoring(by_text):
    """A referee that gives each text its score, wherever it stands."""
    return lambda shown, i: "\n".join(f"{k + 1}: {by_text[t]}" for k, t in enumerate(shown))


# ---------------------------------------------------------------- numbers


def test_worked_referee_outputs(tmp_path):
    outputs, want = [[9, 6, 4], [6, 9, 4], [4, 6, 9], [7, 7, 2]], [1, 1 / 3, -1, 2 / 3]
    assert [tau(G, s) for s in outputs] == pytest.approx(want)
    row = prompt("p", "pref", candidates=["a", "b", "c"], ranking=G)
    run = Run(tmp_path, [row], referee=lambda shown, i: scoring(dict(zip("abc", outputs[i], strict=True)))(shown, i))
    assert run.rewards() == pytest.approx(want) and [s.verdict.score for s in run.groups[0].samples] == pytest.approx([1, 2 / 3, 0, 5 / 6])
    a = advantages(run.rule, run.rewards())
    assert a == pytest.approx([0.855527, 0.095059, -1.425878, 0.475293], abs=1e-6) and sum(a) == pytest.approx(0)
    assert run.noted("referee/accuracy") == pytest.approx((1 + 2 / 3 + 0 + 5 / 6) / 4) and run.noted("pref/reward") == pytest.approx(0.25)
    assert advantages(run.rule, [(t + 1) / 2 for t in want]) == pytest.approx(a, abs=1e-5)  # pair accuracy teaches the same


def test_worked_self_scores(tmp_path):
    texts, q = ["a", "b", "c", "x"], [7, 9, 4, 8]
    run = Run(tmp_path, [prompt("p", "open")], player=lambda name, i: texts[i], referee=scoring(dict(zip(texts, q, strict=True))))
    assert run.rewards() == pytest.approx([0.666667, 0.888889, 0.333333, 0.777778], abs=1e-6)
    assert advantages(run.rule, [float(x) for x in q]) == pytest.approx([0, 0.925820, -1.388730, 0.462910], abs=1e-6)
    assert advantages(run.rule, run.rewards()) == pytest.approx([0, 0.925820, -1.388730, 0.462910], abs=1e-5)


def test_tau_at_its_limits():
    assert tau(G, G) == 1 and tau(G, [-x for x in G]) == -1 and tau(G, [5, 5, 5]) == 0
    assert tau(G, [x**3 for x in (9, 4, 5)]) == tau(G, [9, 4, 5]) == pytest.approx(1 / 3)
    assert [tau([2, 1], s) for s in ([8, 3], [3, 8], [4, 4])] == [1, -1, 0]
    assert tau([1, 1, 0, 0], [9, 9, 2, 2]) == pytest.approx(4 / 6)  # ties of the known ranking count as no agreement


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ("1: 9\n2: 3\n3: 5.5", [9, 3, 5.5]),
        ("3:1;1:2;2: 10", [2, 10, 1]),
        ("a b c\n1: 9\r\n\n 2 : 3 \n3: 5\nx.", [9, 3, 5]),
        ("1: 9\n2: 3", None),  # one is missing
        ("1: 9\n2: 3\n3: 4\n4: 4", None),
        ("1: 9\n2: 3\n3: 4\n1: 9", None),  # said twice
        ("1: 9\n2: 3\n3: 11", None),
        ("1: 0\n2: 3\n3: 4", None),
        ("1: 9\n2: 3\n3: x", None),
        ("1: 9\n2: 3\nabc 3: 4", None),
        ("1: -9\n2: 3\n3: 4", None),
        ("", None),
    ],
)
def test_what_can_be_read(text, scores):
    assert read_scores(text, 3) == scores


# ---------------------------------------------------------------- rows


def test_an_unreadable_referee_is_wrong_on_pref_and_no_judge_on_open(tmp_path):
    rows = [prompt("p", "pref", candidates=["a", "b"], ranking=[1, 0]), prompt("o", "open")]
    run = Run(tmp_path, rows, player=lambda name, i: "abcx"[i], referee=lambda shown, i: "1: 3\n2: 2" if i == 0 else "1: 3")
    assert run.rewards(0)[1:] == [-1.0] * 3 and abs(run.rewards(0)[0]) == 1.0
    assert [s.verdict.status for s in run.groups[0].samples][1:] == ["no_answer"] * 3
    assert run.rewards(1) == [None] * 4 and all(s.weights == {"policy": 0.0} and s.verdict.score is None for s in run.groups[1].samples)
    assert run.noted("referee/readable_share") == pytest.approx(1 / 5) and "rule/open/reward" not in run.io.noted
    assert run.io.noted["rule/referee/accuracy"][1] == 1.0


def test_the_order_is_drawn_and_taken_back(tmp_path):
    """Whatever order the candidates are listed or shown in, each keeps its score; the order differs from visit to visit."""
    by_text, shown = {"a": 9, "b": 6, "c": 6, "x": 1}, set()
    for seed in range(12):
        for texts in (["a", "b", "c", "x"], ["x", "c", "b", "a"]):
            ranking = [{"a": 4, "b": 3, "c": 2, "x": 1}[t] for t in texts]
            run = Run(tmp_path, [prompt("p", "pref", candidates=texts, ranking=ranking)], referee=scoring(by_text), seed=seed)
            assert run.rewards() == pytest.approx([5 / 6] * 4)
        run = Run(tmp_path, [prompt("p", "open")], player=lambda name, i: "xabc"[i], referee=scoring(by_text), seed=seed)
        assert run.rewards() == pytest.approx([0, 8 / 9, 5 / 9, 5 / 9])
        shown.add(run.asked[0][1])
    assert len(shown) > 6


def test_a_preference_for_a_place_is_no_reward_on_average(tmp_path):
    runs = [Run(tmp_path, [prompt("p", "open")], player=lambda n, i: "abcx"[i], referee=lambda shown, i: "1:10;2:1;3:1;4:1", seed=s) for s in range(40)]
    first = [run.rewards().index(1.0) for run in runs]
    assert {first.count(k) > 3 for k in range(4)} == {True}


def test_kinds_do_not_mix_and_keep_their_places(tmp_path):
    rows = [prompt("1", "open"), prompt("2"), prompt("3", "pref", candidates=["a", "b"], ranking=[0, 1]), prompt("4", "verif")]
    run = Run(tmp_path, rows, player=lambda name, i: str(i % 2), referee=lambda shown, i: "\n".join(f"{k + 1}: {k + 1}" for k in range(len(shown))))
    assert [g.prompt.id for g in run.groups] == list("1234")
    assert [{s.role for s in g.samples} for g in run.groups] == [{"policy"}, {"policy"}, {"referee"}, {"policy"}]
    assert run.rewards(1) == run.rewards(3) == [0.0, 1.0, 0.0, 1.0]
    plain = asyncio.run(sample_groups([rows[1]], run.io))
    assert [(s.id, s.token_ids, s.reward, s.weights) for s in plain[0].samples] == [(s.id, s.token_ids, s.reward, s.weights) for s in run.groups[1].samples]
    assert all(len({s.cohort for s in g.samples}) == 1 for g in run.groups) and len({s.cohort for g in run.groups for s in g.samples}) == 4
    context = CHAT.text(run.groups[2].samples[0].context_ids)
    assert context in ("3+1=\n1: a\n2: b\n?", "3+1=\n1: b\n2: a\n?") and CHAT.text(run.groups[0].samples[0].context_ids) == "1+1="
    assert run.noted("open/score") == 0.5  # the row has an answer, so the verifier is asked what it would have said


def test_the_referee_of_open_rows(tmp_path):
    """Greedy and asked once; or sampled several times in several orders, and averaged over what can be read."""
    run = Run(tmp_path, [prompt("o", "open")], player=lambda n, i: "abcx"[i], referee=scoring(dict(zip("abcx", [1, 2, 3, 4], strict=True))), referee_tokens=30)
    (judge,) = [r for r in run.requests if "referee" in r.seed]
    assert judge.sampling.temperature == 0.0 and judge.sampling.max_new_tokens == 30 and len(run.groups[0].samples) == 4
    outputs = iter([scoring(dict(zip("abcx", [1, 2, 3, 4], strict=True))), lambda *_: "?", scoring(dict(zip("abcx", [10, 2, 5, 4], strict=True)))])
    run = Run(tmp_path, [prompt("o", "open")], player=lambda n, i: "abcx"[i], referee=lambda shown, i: next(outputs)(shown, i), calls=3)
    assert run.rewards() == pytest.approx([(5.5 - 1) / 9, 1 / 9, 3 / 9, 3 / 9]) and len({text for _, text in run.asked}) > 1
    assert {r.sampling.temperature for r in run.requests} == {1.0}


def test_equal_scores_teach_nothing(tmp_path):
    run = Run(tmp_path, [prompt("o", "open")], player=lambda n, i: "abcx"[i], referee=lambda shown, i: "1:7;2:7;3:7;4:7")
    assert advantages(run.rule, run.rewards()) == [0.0] * 4


def test_open_rows_wait(tmp_path):
    how = {"player": lambda n, i: "abcx"[i], "referee": lambda shown, i: "1:7;2:6;3:5;4:4", "warmup_steps": 2}
    rows = [prompt("o", "open"), prompt("v")]
    run = Run(tmp_path, rows, step=2, **how)
    assert [(s.role, s.weights, s.reward) for s in run.groups[0].samples] == [("none", {"policy": 0.0}, None)] and len(run.groups[1].samples) == 4
    assert not run.asked
    assert len(Run(tmp_path, rows, step=3, **how).groups[0].samples) == 4


def test_rows_and_keys_are_checked(tmp_path):
    for row, says in (
        (prompt("p", "other"), "row p: kind is 'other'"),
        (prompt("p", "pref", candidates=["a", "b"], ranking=[1]), "row p: kind pref needs candidates"),
        (prompt("p", "pref"), "row p: kind pref needs candidates"),
    ):
        with pytest.raises(InputError, match=says):
            Run(tmp_path, [row])
    for keys in ({"calls": 0}, {"warmup_steps": -1}, {"referee_tokens": -1}):
        with pytest.raises((ValueError, InputError), match="urpo"):
            rule_of(tmp_path, **keys)
    (tmp_path / "mine.txt").write_text("{question}")
    with pytest.raises(InputError, match=r"must contain \{answers\}"):
        rule_of(tmp_path, template="./mine.txt")
    assert use("urpo", {}, home="llmrl.rules", base=tmp_path, where="[rule]").loss[0].over == "sample"
