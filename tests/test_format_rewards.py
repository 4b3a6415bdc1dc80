"""Verifiers of form: length, regex, format (JSON, overlong); what was wrong in exact and numeric."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from llmrl import plugins
from llmrl.credit import View, overlong
from llmrl.records import InputError, Prompt, Verdict, Verifier
from llmrl.rewards.exact import exact
from llmrl.rewards.format import format as form
from llmrl.rewards.length import length, ramp
from llmrl.rewards.numeric import numeric
from llmrl.rewards.regex import regex
from llmrl.scoring import Scorer

HERE = Path(".")


def judge(verifier: Verifier, response: str, gold: str | None = None, question: str = "", **meta: Any) -> Verdict:
    verdict = verifier(Prompt("p", ({"role": "user", "content": question},), gold, meta), response)
    assert isinstance(verdict, Verdict)
    return verdict


def outcome(verdict: Verdict) -> float | str | None:
    return "-" if verdict.status == "no_answer" else verdict.score


# ---------------------------------------------------------------- length


def test_length_in_each_unit() -> None:
    text = "One two,\n\n three.\n"
    for unit, count in {"words": 3, "chars": 18, "lines": 2}.items():
        keys: dict[str, Any] = {"unit": unit}
        assert [judge(length(at_most=n, **keys), text).score for n in (count - 1, count, count + 1)] == [0.0, 1.0, 1.0]
        assert [judge(length(at_least=n, **keys), text).score for n in (count - 1, count, count + 1)] == [1.0, 1.0, 0.0]
        assert judge(length(at_most=1, **keys), text).detail == f"{count} {unit}"
    assert judge(length(at_most=5), "").score == 1.0 and judge(length(at_least=1), "").score == 0.0


def test_the_ramp_is_dapos_overlong_punishment_moved_to_0_1() -> None:
    """DAPO, arXiv:2503.14476 eq. 13 with L_max 20480 and L_cache 4096: 0, -0.5, -1, -1; here 1 + that."""
    assert [ramp(n, 16384, 4096) for n in (0, 16384, 18432, 20480, 20481)] == [1.0, 1.0, 0.5, 0.0, 0.0]
    assert [judge(length(at_most=4, margin=4), "x " * n).score for n in range(3, 10)] == [1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    n = torch.tensor([3, 5, 7, 9])
    view = View(torch.zeros(4), torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.long), n, n > 8, torch.zeros(0), max_new_tokens=8)
    shaped, _ = overlong(cache=4).update(torch.zeros(4, dtype=torch.float64), {}, view)
    assert shaped.tolist() == [ramp(count, 4, 4) - 1 for count in n.tolist()]


def test_length_in_tokens(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    model = Tokenizer(models.WordLevel({"un": 0, "known": 1, "?": 2}, unk_token="?"))
    model.pre_tokenizer = pre_tokenizers.CharDelimiterSplit("-")
    model.enable_truncation(2)
    model.save(str(tmp_path / "tokenizer.json"))
    for where in ("tokenizer.json", "."):
        verify = plugins.use(
            "length", {"at_most": 3, "unit": "tokens", "tokenizer": where}, home="llmrl.rewards", base=tmp_path, where="[verifier]"
        )
        assert [judge(verify, r).score for r in ("un-known-x", "un-known-x-y", "\ud83d")] == [1.0, 0.0, 1.0]
    (tmp_path / "bad.json").write_text("{}")
    for where, told in (("no", "there is no file"), ("bad.json", "cannot be read")):
        with pytest.raises(ValueError, match=told):
            length(at_most=3, unit="tokens", tokenizer=where, base=tmp_path)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({}, "nothing to check"),
        ({"at_most": 3, "at_least": 4}, "at_least <= at_most"),
        ({"at_most": -1}, "at_least <= at_most"),
        ({"at_most": 3, "margin": -1}, "margin >= 0"),
        ({"at_least": 3, "margin": 1}, "does nothing without at_most"),
        ({"at_most": 3, "unit": "tokens"}, "a tokenizer goes with"),
        ({"at_most": 3, "tokenizer": "x"}, "a tokenizer goes with"),
    ],
)
def test_length_refuses(keys: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        length(**keys)


# ---------------------------------------------------------------- regex


def test_regex_found_or_not() -> None:
    dates = regex(pattern=r"\d{4}-\d\d-\d\d")
    assert [judge(dates, r).score for r in ("on 2024-05-06.", "on 2024-5-6", "")] == [1.0, 0.0, 0.0]
    assert [judge(regex(pattern="a.b"), r).score for r in ("a-b", "a\nb")] == [1.0, 0.0]
    whole = regex(pattern=r"Why.*\d", mode="fullmatch")
    for response, score in {" Why\nbecause 4\n": 1.0, "Why 4.": 0.0, "So: Why 4": 0.0}.items():
        assert judge(whole, response).score == score == judge(form(regex=r"Why.*\d"), response).score
    assert [judge(regex(pattern="yes", ignore_case=keep), "YES").score for keep in (False, True)] == [0.0, 1.0]


def test_regex_group_is_the_answer() -> None:
    last = regex(pattern=r"Total: (?P<sum>[^\n]*)", group="sum")
    rows = [
        ("12 km", "Total: 11 km\nTotal: 12  km.", 1.0),
        ("12 km", "Total: 12 km\nTotal: 11 km", 0.0),
        ("12 km", "12 km", "-"),
        ("12 km", "Total: ", "-"),
        (None, "Total: 12", None),
        (" ", "Total: 12", None),
        ("\uff11\uff12", "Total: 12", 1.0),
        ("Na", "Total: NA", 0.0),
    ]
    assert [outcome(judge(last, response, gold)) for gold, response, _ in rows] == [expected for *_, expected in rows]
    assert judge(last, "Total: 12  km.", "12 km").answer == "12  km."
    assert judge(regex(pattern="(a)|b", group=1), "a b", "a").status == "no_answer"  # the last match is the b
    assert judge(regex(pattern=r"is (\w+)", group=1, ignore_case=True), "It IS ten", "TEN").score == 1.0
    assert judge(regex(pattern=r"\d+", group=0, mode="fullmatch"), " 12 ", "12").score == 1.0


@pytest.mark.parametrize(("keys", "told"), [({"pattern": "("}, "no regular expression"), ({"pattern": "a", "group": 1}, "has the groups 0"),
                                            ({"pattern": "(?P<n>a)", "group": "m"}, "'n'")])
def test_regex_refuses(keys: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        regex(**keys)


def test_a_pattern_that_backtracks_without_end_is_a_timeout() -> None:
    items = [(Prompt("p", ()), response) for response in ("a" * 40 + "!", "aaa", "b")]
    with Scorer("regex", {"pattern": r"^(a+)+$"}, HERE, workers=1, timeout_s=0.5, max_failure_rate=1.0) as scorer:
        started = time.monotonic()
        verdicts = scorer.score(items)
        assert time.monotonic() - started < 8
    assert [(v.score, v.status) for v in verdicts] == [(None, "timeout"), (1.0, "ok"), (0.0, "ok")]


# ---------------------------------------------------------------- format: JSON, overlong

POINT: dict[str, Any] = {"type": "object", "properties": {"x": {"type": "integer", "minimum": 0}}, "required": ["x"], "additionalProperties": False}


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ('{"x": 1}', 1.0),
        (' \n{"x": 1}\n', 1.0),
        ('Here it is:\n```json\n{"x": 1}\n```\nGood luck.', 1.0),
        ('```json\n{"y": 1}\n```\nNo:\n```JSON\n{"x": 1}\n```', 1.0),
        ('```json\n{"x": 1}\n```\nNo:\n```json\n{"y": 1}\n```', 0.0),
        ('```json\r\n{"x": 1}\r\n```', 1.0),
        ('```json\n{"x": 1}', 0.0),
        ('{"x": 1} ok?', 0.0),
        ('{"x": -1}', 0.0),
        ('{"x": "1"}', 0.0),
        ('{"x": 1, "x": 2}', 0.0),
        ('{"x": 1, "z": 2}', 0.0),
        ('{"x": NaN}', 0.0),
        ('{"x": 1e999}', 0.0),
        ("{'x': 1}", 0.0),
        ("[1]", 0.0),
        ("", 0.0),
    ],
)
def test_format_json_schema(response: str, score: float) -> None:
    verdict = judge(form(json_schema=POINT), response)
    assert (verdict.score, verdict.status) == (score, "ok") and bool(verdict.detail) == (score == 0.0)


def test_format_json_details_and_limits() -> None:
    assert judge(form(json_schema=POINT), '{"x": -1}').detail == "the JSON at $.x: -1 is less than the minimum of 0"
    assert judge(form(json_schema=POINT), '{"x": 1, "x": 2}').detail == "no JSON: the key 'x' stands twice"
    free = form(json_schema={})
    assert [judge(free, r).score for r in ("1", "null", '"a\u2028b"', "Infinity", "01", '{"a": {"b": 1, "b": 2}}', '"\ud83d"')] == [1, 1, 1, 0, 0, 0, 1]
    for deep in ("[" * 100_000, "[" * 100_000 + "]" * 100_000, '{"a":' * 30_000):
        assert (judge(free, deep).score, judge(free, deep).detail) == (0.0, "the JSON is nested too deeply")
    loop = form(json_schema={"$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}}}, "$ref": "#/$defs/n"})
    assert [judge(loop, "[" * n + "]" * n).score for n in (20, 900)] == [1.0, 0.0]
    assert judge(loop, "[[1]]").score == 0.0
    assert judge(form(json_schema={"multipleOf": 0.5}), "1" + "0" * 400).detail == "a number in the JSON is too large to check"


def test_format_reads_a_schema_file_beside_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "point.json").write_text(json.dumps(POINT))
    verify = plugins.use("format", {"json_schema": "point.json"}, home="llmrl.rewards", base=tmp_path, where="[verifier]")
    assert [judge(verify, r).score for r in ('{"x": 1}', '{"x": 1.5}')] == [1.0, 0.0]
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "bad.json").write_text("{")
    for name, told in {"no.json": "cannot be read", "bad.json": "cannot be read", "list.json": "holds a list"}.items():
        with pytest.raises(InputError, match=told):
            plugins.use("format", {"json_schema": name}, home="llmrl.rewards", base=tmp_path, where="[verifier]")


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        ({"type": "objekt"}, "no JSON schema, at type"),
        ({"properties": {"a": {"pattern": "("}}}, "at properties/a/pattern"),
        ({"$ref": "https://example.com/s.json"}, "example.com/s.json.*nothing is fetched"),
        ({"properties": {"a": {"$ref": "#/$defs/no"}}}, "leads nowhere"),
        ({"$schema": "http://json-schema.org/draft-07/schema#"}, "only Draft 2020-12"),
    ],
)
def test_format_refuses_a_broken_schema(schema: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        form(json_schema=schema)


def test_format_multiplies_by_the_overlong_ramp() -> None:
    verify = form(boxed=True, overlong=10, overlong_margin=20)
    box = r"\boxed{4}"
    assert [judge(verify, box + "x" * n).score for n in (0, 1, 6, 11, 21, 99)] == [1.0, 1.0, 0.75, 0.5, 0.0, 0.0]
    assert judge(verify, "x" * 15).score == 0.0
    assert judge(verify, box + "x" * 6).detail == "15 characters, more than 10"
    assert [judge(form(boxed=True, overlong=10), box + "x" * n).score for n in (1, 2)] == [1.0, 0.0]
    refused: list[tuple[dict[str, Any], str]] = [
        ({"overlong": 5}, 'use the verifier "length"'),
        ({"boxed": True, "overlong_margin": 5}, "a margin only with overlong"),
    ]
    for keys, told in refused:
        with pytest.raises(ValueError, match=told):
            form(**keys)


# ---------------------------------------------------------------- exact and numeric: what was wrong


def test_an_empty_gold_is_an_error_and_units_with_powers_are_read() -> None:
    assert [judge(exact(), "x", gold).status for gold in ("", " . ", "x")] == ["error", "error", "ok"]
    rows = [("12", r"\boxed{12\text{ cm}^2}"), ("9.8", "9.8 m/s^2"), ("0.5", r"\boxed{\frac12}"), ("0.05", r"\frac1{20}"), ("12345", "12\u202f345 km")]
    assert [judge(numeric(), response, gold).score for gold, response in rows] == [1.0] * len(rows)
    assert judge(numeric(), "1.5 * 10^3 m^2", "1500").score == 1.0
