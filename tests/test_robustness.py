"""The robustness evaluation on scripted models, with numbers worked by hand: building, freezing, asking, figures."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from llmrl.chat import Chat, char_tokenizer
from llmrl.engine import TableEngine
from llmrl.evaluation.corruptions import Cut, Gate
from llmrl.evaluation.robustness import ask, empty_kinds, figures, read_index
from llmrl.evaluation.robustness_build import Builder
from llmrl.evaluation.robustness_items import Options
from llmrl.evaluation.robustness_set import BaseTrace, Item, Subject, Suite, read_set, write_set
from llmrl.evaluation.robustness_stats import Resampled
from llmrl.records import InputError, Prompt, Request, Sampling
from llmrl.rewards.exact import exact
from llmrl.tasks import chains

ALPHABET = "0123456789+-=;#~ "
CHAT = Chat(char_tokenizer(ALPHABET))
SAMPLING = Sampling(max_new_tokens=40)
OPTIONS = Options(sampling=SAMPLING, samples=2, solve_samples=2, solve_min=2, cut=Cut(";", "#"), gate=Gate(min_edits=1, marks=("~",)), corrections=("~",))
PROMPTS = [Prompt(row["id"], ({"role": "user", "content": row["prompt"]},), row["answer"]) for row in chains(rows=12, terms=4, seed=3)]
VERIFY = exact(after="#")


def score(items):
    return [VERIFY(p, text) for p, text in items]


def subject(reply: Callable[[str, Request], str], name: str = "scripted", chat: Chat = CHAT, **how) -> Subject:
    return Subject(name, TableEngine(chat, lambda r: reply(chat.text(r.context_ids), r), **how), chat)


def parsed(context: str) -> tuple[list[int], str]:
    """The numbers of the sum before "=", and what stands behind it."""
    expr, _, prefix = context.partition("=")
    return [int(n) for n in re.findall(r"[-+]?\d+", expr.replace(" ", "").rpartition(";")[2])], prefix


def follow(context: str, request: Request) -> str:
    """Goes on from whatever the last step claims, and never looks back."""
    numbers, prefix = parsed(context)
    k = prefix.count(";")
    found = re.findall(r"=(-?\d+);", prefix)
    total, steps = int(found[-1]) if found else numbers[0], []
    for n in numbers[k + 1 :]:
        steps.append(f"{total}{n:+d}={total + n}")
        total += n
    return ";".join(steps) + f"#{total}"


def mend(context: str, request: Request) -> str:
    return f"~#{sum(parsed(context)[0])}"


def polluter(sites):
    """The right step with its result 1 too large; once unreadable; once the step as it is."""
    out = []
    for _, _, step in sites:
        left, _, right = step.rstrip(";").rpartition("=")
        out.append([f"{left}={int(right) + 1};", None, step])
    return out


def diagnose(prompt, steps):
    return [{"role": "user", "content": f"{prompt.text};{steps}".replace("[", "").replace("]", " ").replace("\n\n", ";")}]


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> Suite:
    header, problems, items, traces = Builder(subject(follow), score, OPTIONS, {"polluter": polluter}, diagnose).build(PROMPTS)
    return write_set(tmp_path_factory.mktemp("set") / "set.jsonl.gz", header, problems, items, traces)


def measured(suite: Suite, *subjects: Subject, **how) -> list[dict[str, float]]:
    return [{k: m.value for k, m in f.items()} for f in figures(suite, [ask(s, suite, score) for s in subjects], resamples=200, **how)]


# ---------------------------------------------------------------- building


def test_every_item_is_a_prefix_of_the_trace_with_one_wrong_step(suite):
    recover = [i for i in suite.items if i.phase == "recover"]
    assert {i.source for i in recover} == {"polluter", "number", "sign", "swap"} and len({i.id for i in suite.items}) == len(suite.items)
    for item in recover:
        prompt = suite.problems[item.problem]
        whole = follow(prompt.text, None)  # type: ignore[arg-type]
        before = item.prefix[: -len(item.meta["corruption"])]
        assert whole.startswith(before + item.meta["original"]) and item.meta["original"] != item.meta["corruption"]
        assert CHAT.text(item.context_ids) == prompt.text + item.prefix and before.count(";") == item.meta["step"]
        assert item.meta["corruption"].endswith(";") and "#" not in item.prefix
        assert follow(prompt.text + item.prefix, None).rpartition("#")[2] != prompt.answer  # type: ignore[arg-type]  # the proxy's claim
    controls = {(i.problem, i.at): i for i in suite.items if i.phase == "control"}
    assert {(i.problem, i.at) for i in recover} == set(controls)
    for item in controls.values():
        assert follow(suite.problems[item.problem].text, None).startswith(item.prefix)  # type: ignore[arg-type]


def test_shares_and_reasons_add_up(suite):
    h = suite.header
    assert h["solved"] == {"problems": 12, "solved": 12, "least": 2, "of": 2, "mean_right": 1.0}
    sites = len({(i.problem, i.at) for i in suite.items if i.phase == "control"})
    assert h["shares"]["polluter"]["made"] == 3 * sites and h["shares"]["polluter"]["passed the gate"] == sites
    assert h["left_out"]["recover/polluter"] == {"gate: unchanged": sites, "gate: not between the delimiters, or not expressible": sites}
    for source in ("number", "sign", "swap"):
        counts, lost = h["shares"][source], sum(h["left_out"].get(f"recover/{source}", {}).values())
        assert counts["items"] + lost == sites and counts["effective"] == counts["items"]
    r = {k: sum(v.values()) for k, v in h["left_out"].items() if k.startswith("recover/r=")}
    assert sites + sum(r.values()) == 12 * 4


def test_distraction_is_own_steps_then_the_beginning_of_another_trace(suite):
    items = [i for i in suite.items if i.phase == "distract"]
    assert {i.at for i in items} >= {0.0, 0.6}
    for item in items:
        own, other = (follow(suite.problems[p].text, None) for p in (item.problem, item.meta["from"]))  # type: ignore[arg-type]
        kept = round(item.meta["kept"] * len(own))
        assert kept <= item.at * len(own) and item.problem != item.meta["from"] and (kept == 0 or own[kept - 1] == ";")
        assert item.prefix == own[:kept] + other[: max(1, round(0.2 * len(other)))]


def test_diagnosis_items_balance_the_position_and_know_their_label(suite):
    items = [i for i in suite.items if i.phase == "diagnose"]
    wrong = [i.meta["label"] for i in items if i.meta["label"] >= 0]
    assert len(items) - len(wrong) == 12 and set(wrong) == {0, 1}
    _, _, few, _ = Builder(subject(follow), score, replace(OPTIONS, diagnose=10), {}, diagnose).build(PROMPTS)
    labels = [i.meta["label"] for i in few if i.phase == "diagnose"]
    assert [labels.count(k) for k in (0, 1, -1)] == [5, 5, 10]
    for item in items:
        steps = re.split(r";\d+ ", ";" + item.messages[0]["content"].partition(";")[2])[1:]
        assert len(steps) == item.meta["steps"]
        for k, step in enumerate(steps[: item.meta["label"] if item.meta["label"] >= 0 else None]):
            numbers, prefix = parsed(suite.problems[item.problem].text)
            total = sum(numbers[: k + 2])
            assert re.search(rf"={total}(?!\d)", step), (k, step, prefix)


def test_an_incoherent_polluter_is_refused_and_a_rule_is_not():
    def judge(context, ids):
        return [-9.0 if "99" in CHAT.text(ids) else -0.1] * len(ids)

    def pollute(sites):
        return [["9-9=99;"] for _ in sites]

    builder = Builder(subject(follow, judge=judge), score, replace(OPTIONS, kinds=()), {"polluter": pollute}, diagnose)
    header, _, items, _ = builder.build(PROMPTS)
    assert header["coherence_limit_nats"] == pytest.approx(1.1)
    assert set(header["left_out"]["recover/polluter"]) == {"gate: incoherent"}
    assert {i.source for i in items if i.phase == "recover"} == {"number", "sign", "swap"}


def test_problems_that_the_base_does_not_solve_are_not_corrupted():
    def sometimes(context, request):
        return follow(context, request) if request.seed[-1] == 0 else "#99"

    header, _, items, _ = Builder(subject(sometimes), score, OPTIONS, {}, diagnose).build(PROMPTS)
    assert header["solved"]["solved"] == 0 and header["solved"]["mean_right"] == 0.5
    assert {i.phase for i in items} == {"clean", "perturb"}
    assert header["left_out"]["recover"] == {"the base solves it in fewer than 2 of 2": 12}


def test_a_template_around_the_problem_is_neither_perturbed_nor_put_into_the_diagnosis():
    text = "Tom has 3 pens. How many pens has he now?"
    words = Chat(char_tokenizer("".join(sorted(set(text + " BOX0123456789#;,.-[]INthikeaswrbumouTlyfcv")))))
    prompt = Prompt("p", ({"role": "system", "content": "BOX"}, {"role": "user", "content": f"{text} BOX"}), "3", {"prompt": text})
    options = replace(OPTIONS, cut=Cut(), solve_min=1, kinds=("reordered",))
    builder = Builder(subject(lambda c, r: "3.#3", chat=words), score, options, {}, lambda p, steps: p.messages)
    _, _, items, _ = builder.build([prompt], [{"id": "r", "source": "S", "problem": text, "steps": ["3.", "So 3"], "first_error_step": 1}])
    (new,) = [i for i in items if i.phase == "perturb"]
    assert new.messages == [{"role": "system", "content": "BOX"}, {"role": "user", "content": "How many pens has he now? Tom has 3 pens. BOX"}]
    assert builder.ask(prompt, ["3."], 0, "n", "own") and builder.items[-1].messages[-1]["content"] == text


# ---------------------------------------------------------------- the file


def test_the_same_build_gives_the_same_bytes(suite, tmp_path):
    header, problems, items, traces = Builder(subject(follow), score, OPTIONS, {"polluter": polluter}, diagnose).build(PROMPTS)
    again = write_set(tmp_path / "again.jsonl.gz", header, problems, items, traces)
    assert again.sha256 == suite.sha256 and again.items == suite.items and again.sampling == SAMPLING


@pytest.mark.parametrize("edit", ["item", "header", "cut", "schema", "trace file", "no json"])
def test_another_file_than_was_written_is_refused_with_the_mend(suite, tmp_path, edit):
    path = tmp_path / "set.jsonl"
    write_set(path, {k: v for k, v in suite.header.items() if k != "sha256"}, list(suite.problems.values()), suite.items, suite.traces)
    lines = path.read_text().splitlines(keepends=True)
    head = json.loads(lines[0])
    said = {"item": "edited or cut short", "header": "edited or cut short", "cut": "edited or cut short", "schema": "reads schema 1",
            "trace file": "not a robustness set", "no json": "line 1 is no header"}[edit]  # fmt: skip
    if edit == "item":
        lines[20] = lines[20].replace("=", "+", 1)
    elif edit == "header":
        lines[0] = json.dumps(head | {"samples": 1}) + "\n"
    elif edit == "cut":
        lines = lines[:-1]
    elif edit == "schema":
        lines[0] = json.dumps(head | {"schema": 2}) + "\n"
    else:
        lines[0] = '{"id": "x"}\n' if edit == "trace file" else "hello\n"
    path.write_text("".join(lines))
    with pytest.raises(InputError, match=said) as refused:
        read_set(path)
    assert "llmrl robustness build" in str(refused.value)


def test_a_damaged_or_missing_file_is_refused(tmp_path):
    path = tmp_path / "set.jsonl.gz"
    with pytest.raises(InputError, match="no such file"):
        read_set(path)
    path.write_bytes(gzip.compress(b"x" * 1000)[:-20])
    with pytest.raises(InputError, match="cannot be read to its end"):
        read_set(path)


# ---------------------------------------------------------------- models on the set


def test_one_that_follows_never_recovers_and_one_that_mends_always_does(suite):
    follower, mender = measured(suite, subject(follow, "a"), subject(mend, "b"))
    assert follower["clean/accuracy"] == mender["clean/accuracy"] == 1.0
    for source in ("polluter", "rules", "number", "sign", "swap"):
        got = [[f[f"recover/{source}/any/{m}"] for m in ("rec", "rec0", "drop", "normalised")] for f in (follower, mender)]
        assert got == [[0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 1.0]]
    assert mender["recover/behaviour/explicit"] == 1.0 and mender["recover/behaviour/silent"] == 0.0
    assert "recover/behaviour/explicit" not in follower  # it never recovers: nothing to measure
    assert mender["distract/individual/any/accuracy"] == mender["distract/shared/any/accuracy"] == 1.0
    assert follower["perturb/misleading/accuracy"] == 1.0 and follower["perturb/misleading/consistency"] == 1.0


def test_a_model_that_is_right_in_every_second_sample(suite):
    def half(context, request):
        return mend(context, request) if request.seed[-1] == 0 else "#99"

    found = figures(suite, [ask(subject(half), suite, score)], resamples=200)[0]
    e = found["recover/rules/any/rec"].estimate()
    assert (e.value, e.low, e.high) == (0.5, 0.5, 0.5) and found["clean/accuracy"].value == 0.5
    assert not any(k.startswith("distract/individual") for k in found) and found["distract/all/any/accuracy"].value == 0.5


def test_the_answer_is_read_from_the_continuation_only(suite):
    item = next(i for i in suite.items if i.phase == "recover")
    gold = suite.problems[item.problem].answer
    prefix = f"{item.prefix}#{gold};"
    planted = replace(item, prefix=prefix, context_ids=[*CHAT.prompt_ids(item.messages), *CHAT.tokenizer(prefix, add_special_tokens=False)["input_ids"]])
    sheet = ask(subject(lambda c, r: "#99"), replace(suite, items=[planted]), score)
    assert [a.score for a in sheet.answers[item.id]] == [0.0, 0.0]
    assert [a.score for a in ask(subject(lambda c, r: ""), replace(suite, items=[planted]), score).answers[item.id]] == [0.0, 0.0]


def test_all_requests_of_a_phase_go_in_one_call_with_seeds_of_their_own(suite):
    calls = []
    who = subject(follow)
    generate = who.engine.generate
    who.engine.generate = lambda requests: calls.append(list(requests)) or generate(requests)
    ask(who, suite, score)
    n = {p: sum(i.phase == p for i in suite.items) for p in ("clean", "perturb", "recover", "control", "distract", "diagnose")}
    assert [len(c) for c in calls] == [2 * (n["clean"] + n["perturb"]), 2 * (n["recover"] + n["control"] + n["distract"]), n["diagnose"]]
    assert len({r.seed for c in calls for r in c}) == sum(map(len, calls)) and all(r.sampling.temperature == 0 for r in calls[2])


def test_another_tokenizer_gets_the_text_and_what_it_cannot_express_is_counted(suite):
    turned = Chat(char_tokenizer(ALPHABET[::-1]))
    sheet = ask(subject(follow, chat=turned), suite, score)
    assert not sheet.same_tokenizer and not sheet.left_out
    same = ask(subject(follow), suite, score)
    assert same.same_tokenizer and {k: [a.text for a in v] for k, v in sheet.answers.items()} == {k: [a.text for a in v] for k, v in same.answers.items()}
    poor = Chat(char_tokenizer(ALPHABET.replace("#", "").replace(" ", "")))
    without = ask(subject(follow, chat=poor), suite, lambda items: score([(p, "#1") for p, _ in items]))
    assert set(without.left_out) == {"perturb", "diagnose"} and "no token for '#'" in "".join(without.left_out["perturb"])


def test_contexts_that_do_not_fit_are_left_out_and_counted(suite):
    who = subject(follow)
    longest = max(len(i.context_ids) for i in suite.items if i.phase in ("recover", "control", "distract"))
    who.engine.max_length = longest - 1 + SAMPLING.max_new_tokens
    sheet = ask(who, suite, score)
    long = [i for i in suite.items if len(i.context_ids) >= longest]
    assert sum(sum(v.values()) for v in sheet.left_out.values()) == len(long) > 0 and not any(i.id in sheet.answers for i in long)


# ---------------------------------------------------------------- figures by hand


def small(items: list[Item], golds: dict[str, str | None]) -> Suite:
    prompts = {k: Prompt(k, ({"role": "user", "content": "1+1="},), v) for k, v in golds.items()}
    header = {"sha256": "0" * 64, "tokenizer": subject(follow).digest, "samples": 2, "sources": ["rules"], "base": "b", "sampling": {
        "max_new_tokens": 40, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "stop": []}, "options": {
        "cut": {"answer_mark": "#"}, "corrections": ["~"], "kinds": ["typos"], "r": [0.1], "m": [0.0]}}  # fmt: skip
    return Suite(header, prompts, items, [BaseTrace("p", [1], [2], "x")])


def item(name: str, phase: str, problem: str, source: str = "", at: float | None = None, **meta) -> Item:
    return Item(name, phase, problem, [{"role": "user", "content": "1+1="}], "", CHAT.prompt_ids([{"role": "user", "content": name}]), source, at, meta)


def scripted(table: dict[str, list[str]]) -> Subject:
    return subject(lambda context, request: table[context][request.seed[-1]])


def test_diagnosis_by_hand():
    """Labels 2, 0, 1 answered 2, 1, nothing; clean ones answered -1 and 0. acc_err 1/3, acc_ok 1/2, F1 = 2/5; within one: 2 and 1 of 0, so 2/3."""
    rows = {"10": (2, 4, 2, "#2"), "11": (0, 3, 2, "#1"), "12": (1, 3, 1, ""), "13": (-1, 3, 0, "#-1"), "14": (-1, 1, 0, "#0")}
    items = [item(k, "diagnose", k, "own", label=label, steps=n, longest=longest) for k, (label, n, longest, _) in rows.items()]
    got = measured(small(items, dict.fromkeys(rows)), scripted({k: [said] for k, (*_, said) in rows.items()}))[0]
    want = {"acc_err": 1 / 3, "acc_ok": 1 / 2, "f1": 0.4, "within_one": 2 / 3, "guess_longest": 2 / 3, "no_answer": 1 / 5}
    want["chance"] = (1 / 5 + 1 / 4 + 1 / 4 + 1 / 4 + 1 / 2) / 5
    assert {k.rpartition("/")[2]: v for k, v in got.items() if k.startswith("diagnose/own")} == pytest.approx(want)


@pytest.mark.parametrize(("text", "index"), [(r"so \boxed{3}", 3), (r"\boxed{-1}", -1), (r"\boxed{1} no, \boxed{\text{step } 2}", 2), ("it is 4", None),
                                             (r"\boxed{none}", None), (r"\boxed{1 or 2}", None), ("the step is #2", 2), ("", None)])  # fmt: skip
def test_the_index_is_read_from_the_last_box(text, index):
    assert read_index(text, "#") == index


def test_perturbation_by_hand():
    """Clean a: 2, 2 (gold 2); perturbed 2, 3. Clean b: 5, 5 (gold 4); perturbed 5, 5. Clean c: none. Accuracy 1/6 of the three, clean 1/3; a and b
    agree, c has no answer."""
    table = {"1": ["#2", "#2"], "2": ["#5", "#5"], "3": ["", ""], "4": ["#2", "#3"], "5": ["#5", "#5"], "6": ["#9", "#9"]}
    items = [item(n, "clean", p) for n, p in zip("123", "abc", strict=True)]
    items += [item(n, "perturb", p, "typos") for n, p in zip("456", "abc", strict=True)]
    got = measured(small(items, {"a": "2", "b": "4", "c": "1"}), scripted(table))[0]
    want = {"accuracy": 1 / 6, "clean": 1 / 3, "drop": 1 / 6, "consistency": 1.0}
    assert {k.rpartition("/")[2]: v for k, v in got.items() if k.startswith("perturb/typos")} == pytest.approx(want)
    assert got["clean/no_answer"] == pytest.approx(1 / 3)


def test_behaviour_by_hand():
    """Of 5 right continuations one has the mark "~", one writes the original step again, three do neither; wrong ones do not count."""
    table = {"1": ["~#2", "1+1=2;#2"], "2": ["#2", "#2"], "3": ["#2", "~#3"]}
    items = [item(n, "recover", "a", "number", 0.1, original=" 1+1=2;") for n in table]
    got = measured(small(items, {"a": "2"}), scripted(table))[0]
    assert [got[f"recover/behaviour/{k}"] for k in ("explicit", "redone", "silent")] == [0.2, 0.2, 0.6]


def test_empty_kinds_are_named():
    o = small([item("1", "clean", "a"), item("2", "recover", "a", "number", 0.3)], {"a": "2"})
    phases = [f"{p} (none at all)" for p in ("control", "distract", "diagnose", "perturb")]
    assert empty_kinds(o) == [*phases, "recover/r=0.1", "recover/rules"]


# ---------------------------------------------------------------- bootstrap


def test_measured_by_hand():
    r = Resampled(["a", "b", "c"], resamples=4000, seed=0)
    means = r.mean({"a": [1.0, 0.0], "b": [1.0], "c": []})
    assert means.value == 0.75 and means.problems == 2
    shares = r.share({"a": [1.0, 0.0, 0.0], "b": [1.0], "c": []})
    assert shares.value == 0.5
    assert (means - shares).value == 0.25 and (shares / means).value == pytest.approx(2 / 3) and means.harmonic(shares).value == pytest.approx(0.6)
    e = means.estimate()
    assert e.low == 0.5 and e.high == 1.0
    nothing = r.mean({})
    assert nothing.estimate().value is None and (means / nothing).estimate().value is None
    zero = r.mean({"a": [0.0], "b": [0.0]})
    assert zero.harmonic(zero).value == 0.0 and (means / zero).estimate().value is None


def test_differences_are_of_the_same_resampled_problems():
    rng = np.random.default_rng(0)
    names = [str(i) for i in range(60)]
    r = Resampled(names, resamples=2000, seed=1)
    hard = {n: float(rng.random()) for n in names}
    a, b = r.mean({n: [v] for n, v in hard.items()}), r.mean({n: [v + 0.1] for n, v in hard.items()})
    d = (b - a).estimate()
    assert d.value == pytest.approx(0.1) and d.low == pytest.approx(0.1) and d.high == pytest.approx(0.1)  # all problems gain 0.1
    one = a.estimate()
    assert one.high is not None and one.low is not None and one.high - one.low > 0.1
    sd = float(np.std(list(hard.values())) / 60**0.5)  # theory: the mean's standard error
    assert float(np.std(a.draws_R)) == pytest.approx(sd, rel=0.1)
