"""Metric declarations, metrics.jsonl, the Wilson interval, the curve."""

from __future__ import annotations

import json
import math
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from llmrl.curves import draw_curve
from llmrl.metrics import METRICS, Metric, MetricLog, is_wall_clock, metric, wilson, without_times
from llmrl.records import InputError


def lines(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text().splitlines()


def test_every_metric_has_a_unit_a_reduction_and_a_sentence():
    for name, m in METRICS.items():
        assert re.fullmatch(r"[a-z0-9_]+(/[a-z0-9_]+)*(/\*)?", name), name
        assert m.unit and m.reduction in ("mean", "sum", "max", "min", "last") and m.help.endswith("."), name
        assert not name.startswith("time/") or "s" in re.split(r"[/ ]", m.unit), f"{name}: wall-clock figures are in seconds or per second"


def test_names_and_families(monkeypatch):
    monkeypatch.setitem(METRICS, "loss/*", Metric("nats", "mean", "A loss term."))
    monkeypatch.setitem(METRICS, "loss/kl", Metric("nats", "sum", "Its own declaration comes first."))
    assert metric("loss/policy").help == "A loss term." and metric("loss/kl").reduction == "sum" and metric("loss/a/b").unit == "nats"
    assert is_wall_clock("time/step") and not is_wall_clock("timely") and not is_wall_clock("eval/time")
    assert without_times({"step": 1, "time/step": 0.3, "reward/mean": 1.0}) == {"step": 1, "reward/mean": 1.0}
    with pytest.raises(ValueError, match=r"'reward/men' is not declared.*nearest: 'reward/mean'"):
        metric("reward/men")


def test_rows_are_written_in_one_way(tmp_path):
    log = MetricLog(tmp_path, fsync=True)
    log.append({"step": 1, "time/step": np.float64(0.1), "reward/mean": 0.1 + 0.2, "eval/accuracy": None})
    log.append({"step": np.int64(2), "reward/mean": float("nan"), "length/mean_tokens": float("inf"), "eval/accuracy": 1})
    assert lines(tmp_path) == [
        '{"eval/accuracy": null, "reward/mean": 0.30000000000000004, "step": 1, "time/step": 0.1}',
        '{"eval/accuracy": 1, "length/mean_tokens": null, "reward/mean": null, "step": 2}',
    ]
    assert MetricLog.read(tmp_path) == [json.loads(line) for line in lines(tmp_path)]
    assert MetricLog.read(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"step": 2, "reward/men": 1.0}, "not declared"),
        ({"step": 2, "reward/mean": "high"}, "must be a number"),
        ({"step": 2, "reward/mean": True}, "must be a number"),
        ({"reward/mean": 1.0}, "whole number 'step'"),
        ({"step": 1}, "step 1 after those of step 1"),
    ],
)
def test_rows_that_are_refused(tmp_path, row, match):
    log = MetricLog(tmp_path)
    log.append({"step": 1})
    with pytest.raises(ValueError, match=match):
        log.append(row)
    assert len(lines(tmp_path)) == 1


def test_truncate_and_go_on_equals_the_unbroken_file(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    rows = [{"step": s, "reward/mean": s / 7} for s in range(6)]
    for row in rows:
        MetricLog(whole).append(row)
    want = (whole / "metrics.jsonl").read_bytes()
    for cut in range(len(want) + 1):  # killed at any byte, resumed from a checkpoint of step 2
        broken.mkdir(exist_ok=True)
        (broken / "metrics.jsonl").write_bytes(want[:cut])
        finished = want[:cut].count(b"\n")
        assert len(MetricLog.read(broken)) == finished
        log = MetricLog(broken)
        assert log.truncate_after(2) == min(3, finished)
        for row in rows[min(3, finished) :]:
            log.append(row)
        assert (broken / "metrics.jsonl").read_bytes() == want


def test_a_torn_line_is_not_glued_to_the_next(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "rew')
    MetricLog(tmp_path).append({"step": 2})
    assert lines(tmp_path) == ['{"step": 1}', '{"step": 2}']


def test_a_broken_line_in_the_middle_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(InputError, match="line 2: not JSON"):
        MetricLog.read(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"stop": 1}\n')
    with pytest.raises(InputError, match="line 1: no object with a whole number 'step'"):
        MetricLog(tmp_path)


def test_wilson_golden():
    # By hand for 8 of 10, z = 1.96: centre 0.99208 / 1.38416 = 0.71674, half width 1.96 / 1.38416 * sqrt(0.025604) = 0.22658.
    low, high = wilson(8, 10)
    assert low == pytest.approx(0.49016, abs=2e-5) and high == pytest.approx(0.94332, abs=2e-5)
    # Table I of Newcombe, Stat. Med. 17 (1998) 857-872, method 3: 81/263 and 15/148 and 0/20 and 1/29.
    table = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0.0, 0.1611), (1, 29): (0.0061, 0.1718)}
    for (successes, n), want in table.items():
        assert wilson(successes, n) == pytest.approx(want, abs=5e-5)


def test_wilson_properties():
    for n in (1, 2, 7, 200):
        for successes in range(n + 1):
            low, high = wilson(successes, n)
            assert 0.0 <= low <= successes / n <= high <= 1.0
            assert wilson(n - successes, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)
            for end in {low, high} - {0.0, 1.0}:  # the ends are where the score test is on its edge
                assert abs(successes / n - end) == pytest.approx(1.959963984540054 * math.sqrt(end * (1 - end) / n), abs=1e-9)
    assert wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="successes"):
        wilson(3, 2)


def pixels(path: Path) -> np.ndarray:
    """[height, width, channels] of a PNG, by hand: an independent reader of what was written."""
    raw = path.read_bytes()
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    width, height, _, kind = struct.unpack(">IIBB", raw[16:26])
    at, data = 8, b""
    while at < len(raw):
        (length,) = struct.unpack(">I", raw[at : at + 4])
        data += raw[at + 8 : at + 8 + length] if raw[at + 4 : at + 8] == b"IDAT" else b""
        at += 12 + length
    assert len(zlib.decompress(data)) == height * (1 + width * {2: 3, 6: 4}[kind])
    import matplotlib.image as matplotlib_image

    return matplotlib_image.imread(path)


def run_rows(n: int, every: int) -> list[dict]:
    rows: list[dict] = [{"step": 0}]
    for s in range(1, n + 1):
        rows.append({"step": s, "reward/mean": 1 - 0.5**s, "length/mean_tokens": 12 + s % 3, "entropy/rollout_nats": 1 / (s + 1)})
    for row in rows[::every]:
        low, high = wilson(row["step"], n + 1)
        row |= {"eval/accuracy": row["step"] / (n + 1), "eval/accuracy_low": low, "eval/accuracy_high": high}
    return rows


@pytest.mark.parametrize(("n", "every"), [(90, 10), (3, 2), (0, 1), (5, 99)])
def test_the_curve_is_drawn(tmp_path, n, every):
    log = MetricLog(tmp_path)
    for row in run_rows(n, every):
        log.append(row)
    path = draw_curve(tmp_path)
    assert path == tmp_path / "curve.png" and sorted(p.name for p in tmp_path.iterdir()) == ["curve.png", "metrics.jsonl"]
    image = pixels(path)[..., :3]
    assert image.shape == (832, 1248, 3)
    blue = (image[..., 2] > 0.8) & (image[..., 0] < 0.3)  # the lines
    half_y, half_x = 416, 624
    quarters = [blue[:half_y, :half_x], blue[:half_y, half_x:], blue[half_y:, :half_x], blue[half_y:, half_x:]]
    assert [bool(q.sum() > 20) for q in quarters] == [n > 0, True, n > 0, n > 0]
    first = path.read_bytes()
    draw_curve(tmp_path)
    assert path.read_bytes() == first


def test_a_curve_of_nothing_is_refused(tmp_path):
    with pytest.raises(InputError, match="no metrics to draw"):
        draw_curve(tmp_path)
