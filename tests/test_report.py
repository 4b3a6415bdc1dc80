"""The report: its page holds what the results hold and nothing of it can break out; a browser draws it, filters and sorts."""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from llmrl.evaluation import report
from llmrl.evaluation.compare import compare
from llmrl.evaluation.dimensions import FunctionJudge, Judgement
from llmrl.evaluation.frs import FRSResult, frs
from llmrl.evaluation.report import PILLARS, chosen_traces, embedded, is_kept, markdown, page, page_data, pillars, spread, write_report
from llmrl.evaluation.report_run import run_page
from llmrl.evaluation.traces import Trace

NASTY = "</script><script>document.title='OWNED'</script><img src=x onerror=\"document.title='OWNED'\"><!--<script> &lt;b&gt; \u2028 ${x} @@JS@@ </pre>"


def some_traces(model: str, benchmark: str, right: float, n: int = 12, k: int = 4) -> list[Trace]:
    """n problems, k samples; token 0 of each is the one least likely."""
    rng = random.Random(f"{model}/{benchmark}")
    found = []
    for q in range(n):
        for i in range(k):
            length = rng.randint(12, 40)
            logs = [math.log(rng.uniform(0.02, 0.9)), *(math.log(rng.uniform(0.9, 1.0)) for _ in range(length - 1))]
            tokens = [f"{benchmark} {q}", *(rng.choice([" so", " then", "\n", " 12", " é", ""]) for _ in range(length - 2)), NASTY if i == 0 else "."]
            ok = rng.random() < right
            found.append(Trace(
                f"{benchmark}-{q}/{i}", f"{benchmark}-{q}", "".join(tokens), prompt=f"Problem {q}? {NASTY if q == 0 else ''}", gold=str(q), raw_logprobs=logs,
                tokens=tokens, finish="length" if i == 3 else "stop", score=float(ok), status="ok", answer=str(q), model=model, sample=i,
                extra={"benchmark": benchmark},
            ))  # fmt: skip
    return found


def scores(case: Any) -> Judgement:
    rng = random.Random(case.id)
    if rng.random() < 0.1:
        return Judgement(failure=f"no JSON object in the reply: {NASTY}", failed="reply")
    marks = {p: rng.randint(2, 3) + 2 * bool(case.correct) for p in PILLARS}
    return Judgement(marks, (sum(marks.values()) - 4) / 16, reasons=f"Fine. {NASTY}")


@functools.cache
def made() -> tuple[list[FRSResult], list[list[Trace]]]:
    results, sources = [], []
    for model, right in (("before | <b>rl</b>", 0.3), ("after", 0.8)):
        for benchmark in ("sums", "words"):
            traces = some_traces(model, benchmark, right)
            results.append(frs(traces, judge=FunctionJudge(scores), subsample=None, resamples=50))
            sources.append(traces)
    rules = FunctionJudge(lambda case: 0.25 + 0.5 * bool(case.correct), name="rules", label="baseline: rules, no FRS")
    results.append(frs(sources[0], judge=rules, subsample=None, resamples=50))
    return results, [*sources, sources[0]]


class Page(HTMLParser):
    """Elements with their attributes, and the texts of script elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1] += data


def written(tmp_path: Path, **how: Any) -> tuple[str, Page, dict[str, Any]]:
    results, sources = made()
    paths = write_report(results, tmp_path / "r", traces=sources, **how)
    assert [p.name for p in paths] == ["report.html", "report.json", "report.md"] and sorted(os.listdir(tmp_path / "r")) == sorted(p.name for p in paths)
    text = paths[0].read_text(encoding="utf-8")
    parsed = Page(text)
    return text, parsed, json.loads(parsed.scripts[0])


# ---------------------------------------------------------------- the page as a text


def test_the_page_holds_the_results_and_the_traces(tmp_path):
    results, sources = made()
    comparison = {"ties": [{"points": 1, "pairs": 2}]}
    _, _, data = written(tmp_path, comparison=comparison, notes=["a note"])
    assert data["comparison"] == comparison and data["notes"] == ["a note"]
    for r, row in zip(results, data["results"], strict=True):
        want = {key: value for key, value in r.to_json().items() if key not in ("judged", "frs")}
        assert {key: row[key] for key in want} == json.loads(json.dumps(want))
        assert row["frs"]["value"] == r.frs.value and row["is_frs"] == (r.label == "FRS")
        assert [(p[3], p[1], p[2]) for p in row["points"]] == [(t.id, t.quality, t.correct) for t in r.judged if t.quality is not None]
    assert len(data["traces"]) == sum(len(r.judged) for r in results) == data["traces_left"]["shown"]
    for row in data["traces"]:
        trace = next(t for t in sources[row["r"]] if t.id == row["id"])
        judged = next(t for t in results[row["r"]].judged if t.id == row["id"])
        assert row["tokens"] == trace.tokens and row["prompt"] == trace.prompt and row["low"] == judged.low_tokens and row["low"][0] == 0
        assert row["p"] == pytest.approx([math.exp(x) for x in trace.raw_logprobs or []], rel=6e-3)
        assert (row["quality"], row["scores"], row["reasons"], row["failure"]) == (judged.quality, judged.scores, judged.reasons, judged.failure)
    whole = json.loads((tmp_path / "r/report.json").read_text())
    assert whole["results"] == json.loads(json.dumps([r.to_json() for r in results]))
    assert [FRSResult.from_json(r) for r in whole["results"]] == results


def test_nothing_in_a_trace_can_leave_its_place(tmp_path):
    text, parsed, data = written(tmp_path, title=NASTY, notes=[NASTY])
    assert NASTY in data["traces"][0]["prompt"] + data["traces"][0]["reasons"] + data["title"]
    assert [a.get("type") for tag, a in parsed.elements if tag == "script"] == ["application/json", None]
    assert not any(tag in ("img", "iframe", "object", "link", "base", "b") for tag, _ in parsed.elements)
    assert text.count("OWNED") == parsed.scripts[0].count("OWNED") and not set("<>&\u2028") & set(parsed.scripts[0])
    for value in (NASTY, {"</script>": ["<!--", "&", "\u2029", "\ud800"]}):
        assert json.loads(embedded(value)) == value and "<" not in embedded(value)


def test_the_page_fetches_nothing_and_runs_its_own_script_only(tmp_path):
    text, parsed, _ = written(tmp_path)
    assert not any(name in ("src", "href", "action", "srcset", "data", "poster") for _, attrs in parsed.elements for name in attrs)
    assert not any(name.startswith("on") for _, attrs in parsed.elements for name in attrs)
    rest = text.replace(parsed.scripts[0], "")
    assert re.findall(r"https?://[^\"' ]+", rest) == ["http://www.w3.org/2000/svg"]  # the name of a namespace
    assert "@import" not in rest and "url(" not in rest and "innerHTML" not in rest and "fetch(" not in rest
    policy = next(a["content"] for tag, a in parsed.elements if tag == "meta" and a.get("http-equiv"))
    digest = base64.b64encode(hashlib.sha256(parsed.scripts[1].encode()).digest()).decode()
    assert policy and "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy


def test_the_same_results_give_the_same_bytes(tmp_path):
    assert written(tmp_path / "a")[0] == written(tmp_path / "b")[0]


def test_caps_are_kept_and_told(tmp_path):
    results, sources = made()
    text, _, data = written(tmp_path, cap=50)
    by = [sum(t["r"] == k for t in data["traces"]) for k in range(len(results))]
    assert by == [10] * 5 and data["traces_left"] == {"judged": 240, "shown": 50, "cap": 50, "max_bytes": 16_000_000}
    assert [t["rank"] for t in data["traces"] if t["r"] == 0][:5] == [0, 1, 2, 3, 4]
    shown, left = chosen_traces(results, sources, cap=400, max_bytes=60_000)
    assert len(json.dumps(shown, ensure_ascii=False).encode()) < 64_000 and left["shown"] == len(shown) and {t["r"] for t in shown} == set(range(5))
    assert spread(list(range(100)), 10) == [0, 1, 2, 3, 4, 14, 33, 52, 71, 90] and spread([1, 2], 5) == [1, 2]
    assert len(text) < 400_000


def test_a_long_trace_is_shown_without_its_middle():
    n = report.HEAD + report.TAIL + 500
    trace = Trace("a", "p", "x" * n, tokens=["x"] * n, raw_logprobs=[-i / n for i in range(n)])
    r = frs([replace(trace, score=1.0, status="ok", gold="1", prompt="q")], judge=FunctionJudge(scores), subsample=None, resamples=10)
    row = report.shown_trace(trace, r.judged[0], 0, True)
    assert len(row["tokens"]) == report.HEAD + report.TAIL == len(row["p"]) and row["gap"] == [report.HEAD, 500]
    assert row["low"] == list(range(report.HEAD + report.TAIL - n // 10, report.HEAD + report.TAIL))  # the least likely are the last ones
    bare = report.shown_trace(replace(trace, tokens=None), r.judged[0], 0, True)
    assert bare["text"] == "x" * n and "tokens" not in bare


def test_kept_traces_and_their_dimensions():
    results, _ = made()
    for r in results[:4]:
        kept = [t for t in r.judged if is_kept(r, t)]
        assert [t.rank for t in kept] == list(range(len(kept))) and len(kept) == r.composition["kept"] == 4
        marked = [t.scores for t in kept if t.scores]
        mean = pillars(r, True)
        assert mean["n"] == len(marked)
        if marked:
            assert sum(mean[p] - 1 for p in PILLARS) / 16 * 100 == pytest.approx(r.frs.value)
    assert pillars(results[4], False) == {"n": 0} | dict.fromkeys(PILLARS)


def test_what_could_not_be_measured_is_a_gap_and_no_zero(tmp_path):
    traces = [replace(t, score=None, status=None, prompt=None, messages=[{"role": "user", "content": "asked"}], tokens=None) for t in some_traces("m", "b", 1)]
    failing = FunctionJudge(lambda case: Judgement(failure="down", failed="reply"), blind=True, label="FRS (blind judge)")
    r = frs(traces, judge=failing, subsample=None, resamples=10)
    write_report([r], tmp_path, traces=[traces])
    data = json.loads(Page((tmp_path / "report.html").read_text()).scripts[0])
    row = data["results"][0]
    assert row["frs"]["value"] is None and row["pass_at_1"]["value"] is None and row["points"] == [] and row["pillars"]["kept"]["faithfulness"] is None
    assert data["traces"][0]["prompt"] == "user: asked" and data["traces"][0]["failure"] == "down"
    line = next(line for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("| m |"))
    assert line.split("|")[3:6] == [" - ", " - ", " - "]
    assert embedded(page_data([replace(r, ece=math.nan)]))  # no NaN, which JSON has not
    write_report([r], tmp_path / "bare")
    assert "[]" in Page((tmp_path / "bare/report.html").read_text()).scripts[0]
    with pytest.raises(ValueError, match="1 results but 2 sources"):
        write_report([r], tmp_path, traces=[[], []])


def test_markdown_has_the_numbers_and_keeps_baselines_apart():
    results, _ = made()
    text = markdown(results, notes=["two\nlines"])
    best = results[2]
    assert f"{best.frs.value:.1f} [{best.frs.low:.1f}, {best.frs.high:.1f}]" in text and "- two lines" in text
    assert "| before \\| &lt;b>rl&lt;/b> | sums |" in text
    frs_part, base_part = text.split("## baseline: rules, no FRS")
    assert "0.25" not in frs_part.split("## FRS")[0] and frs_part.count("| after |") == 6 and "| after |" not in base_part
    widths = {line.count("|") - line.count("\\|") for line in frs_part.splitlines() if "pass@1, %" in line or line.startswith("| after | sums | 6")}
    assert len(widths) == 1


def test_two_judges_of_one_label_stand_apart():
    results, _ = made()
    others = [replace(r, judge={**r.judge, "name": "second"}) for r in results[:4]]
    rows = page_data([*results, *others])["results"]
    names = [row["series"] for row in rows]
    assert names == ["FRS by function"] * 4 + ["baseline: rules, no FRS"] + ["FRS by second"] * 4
    text = markdown([*results, *others])
    assert [line for line in text.splitlines() if line.startswith("## ")] == ["## FRS by function", "## baseline: rules, no FRS", "## FRS by second"]
    assert {row["series"] for row in page_data(results)["results"]} == {"FRS", "baseline: rules, no FRS"}  # one judge needs no name


# ---------------------------------------------------------------- the page of a training run


def a_run(folder: Path, steps: int = 5, prompts: int = 4, group: int = 3) -> Path:
    """A run directory of samples of 4 tokens, "ab" and the end token written by ids of characters."""
    (folder / "samples").mkdir(parents=True)
    for step in range(1, steps + 1):
        with gzip.open(folder / f"samples/step-{step:06d}.jsonl.gz", "wt") as file:
            for q in range(prompts):
                for i in range(group):
                    row = {
                        "schema": 1, "step": step, "id": f"q{q}~{step}/{i}", "prompt_id": f"q{q}~{step}", "role": "policy", "prompt": f"ask {q} {NASTY}",
                        "gold": "b", "response": "a\nb", "finish": "stop", "policy_version": step, "reward": 0.5 * i, "score": float(i == 2), "status": "ok",
                        "answer": "b", "advantage": i - 1.0, "context_ids": [1], "token_ids": [97, 10, 98, 300], "logprobs": [-0.1, -2.0, -0.2, -0.0],
                    }  # fmt: skip
                    file.write(json.dumps(row) + "\n")
    rows = [json.dumps({"step": k, "reward/mean": k / 10, "eval/accuracy": None}) for k in range(steps)]
    (folder / "metrics.jsonl").write_text("\n".join([*rows, '{"step": 9, "rew']))
    (folder / "manifest.json").write_text(json.dumps({"recipe": {"rollout": {"temperature": 1.0}}}))
    return folder


def test_the_samples_of_a_run_in_whole_groups(tmp_path):
    def text(ids):
        return "".join(chr(i) for i in ids if i < 256)

    folder = a_run(tmp_path / "mine")
    told = run_page(folder, tmp_path / "all.html", text=text)
    assert told == {"out": str(tmp_path / "all.html"), "samples": 60, "shown": 60}
    data = json.loads(Page((tmp_path / "all.html").read_text()).scripts[0])
    assert data["title"] == "Samples of mine" and [r["benchmark"] for r in data["results"]] == [f"step {k}" for k in range(1, 6)]
    assert data["metrics"] == [{"step": k, "reward/mean": k / 10} for k in range(5)]
    first = data["traces"][0]
    assert first["tokens"] == ["a", "\n", "b", ""] and first["p"] == [0.905, 0.135, 0.819, 1.0] and first["low"] == [1] and first["confidence"] == 0.135
    assert (first["quality"], first["advantage"], first["correct"], first["problem"]) == (0.0, -1.0, 0.0, "q0")
    told = run_page(folder, tmp_path / "some.html", cap=20, steps=(2, 5))
    some = json.loads(Page((tmp_path / "some.html").read_text()).scripts[0])
    assert told["samples"] == 48 and told["shown"] == 18 == len(some["traces"]) and "tokens" not in some["traces"][0]
    names = [t["id"] for t in some["traces"]]
    assert len({n.split("/")[0] for n in names}) == 6 and len(names) == len(set(names))  # groups of three, none in part


def test_the_view_command_and_its_page(tmp_path):
    folder = a_run(tmp_path / "mine")
    done = subprocess.run(
        [sys.executable, "-m", "llmrl.cli", "view", str(folder), "--json"], capture_output=True, text=True, timeout=120, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"out": str(folder / "report.html"), "samples": 60, "shown": 60, "shaded": False}
    dom = browse(tmp_path, folder / "report.html", "--dump-dom")
    assert "<title>Samples of mine</title>" in dom and dom.count("<section>") == 2 and "60 of 60 samples are in this page" in dom and "reward 0.5" in dom


# ---------------------------------------------------------------- the page in a browser


def chromium() -> str:
    found = next((p for name in ("chromium", "chromium-browser", "google-chrome", "chrome") if (p := shutil.which(name))), None)
    if found is None:
        pytest.skip("no chromium on this machine: the page was checked as a text only")
    return found


DRIVER = """
setTimeout(() => {
  const out = {title: document.title, overflow: document.documentElement.scrollWidth - innerWidth};
  const items = () => [...document.querySelectorAll(".list .item[data-i]")].map(x => T[+x.dataset.i]);
  const set = (name, value) => {
    const label = [...document.querySelectorAll("label")].filter(l => l.firstChild.textContent === name).at(-1), select = label.querySelector("select");
    select.value = value;
    select.dispatchEvent(new Event("change"));
  };
  const search = document.querySelector("input[type=search]");
  const find = text => { search.value = text; search.dispatchEvent(new Event("input")); };
  out.sections = [...document.querySelectorAll("h2")].map(x => x.textContent);
  out.marks = [...document.querySelectorAll(".chart")].map(c => c.querySelectorAll("svg path, svg rect").length);
  out.comparison = [...document.querySelectorAll(".generic h3")].map(x => x.textContent);
  out.pairs = document.querySelectorAll(".generic table")[0].querySelectorAll("tbody tr").length;
  out.all = items().length; out.sorted = items().map(t => t.confidence);
  set("order", "worst"); out.worst = items().map(t => t.quality);
  set("verdict", "right"); out.right = items().map(t => t.correct);
  set("quality", "high"); out.high = items().map(t => t.quality); set("quality", ""); set("verdict", "");
  set("set", "kept"); out.kept = items().map(t => t.kept); set("set", "");
  find("SUMS-0/ img"); out.found = items().map(t => t.problem);
  find("nothing of this"); out.none = document.querySelector(".list").textContent;
  find("");
  const i = T.findIndex(t => t.problem === "sums-0" && t.scores);
  showTrace(i, false);
  const spans = [...document.querySelectorAll(".trace span")];
  out.trace = document.querySelector(".trace").textContent === T[i].tokens.join("");
  out.low = spans.map((s, k) => s.classList.contains("low") ? k : -1).filter(k => k >= 0);
  out.wantLow = T[i].low;
  out.tips = spans.slice(0, 2).map(s => s.dataset.tip);
  out.shade = spans[0].style.background;
  out.shown = document.getElementById("trace").textContent;
  out.images = document.images.length; out.scripts = document.scripts.length; out.titleAfter = document.title;
  const pre = document.createElement("pre");
  pre.id = "probe";
  pre.textContent = JSON.stringify(out);
  document.body.replaceChildren(pre);
}, 400);
"""


def browse(tmp_path: Path, file: Path, *flags: str) -> str:
    """What a headless Chromium makes of the file: its standard output. Its messages must hold no error of the page."""
    command = [chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr", "--virtual-time-budget=3000"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", *flags, file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=os.environ | {"HOME": str(tmp_path)})
    messages = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert done.returncode == 0 and not messages, (messages, done.stderr[-800:])
    return done.stdout


@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_draws_filters_and_sorts(tmp_path, monkeypatch, width):
    chromium()
    shutil.copytree(report.HERE, tmp_path / "templates")
    with (tmp_path / "templates/report_traces.js").open("a") as js:
        js.write(DRIVER)
    monkeypatch.setattr(report, "HERE", tmp_path / "templates")
    comparison = compare(made()[0], resamples=20).to_json() | {"a part of tomorrow": [{"x": 1, "y": {"z": None}}]}
    written(tmp_path, comparison=comparison, title="Two checkpoints", cap=240)
    dom = browse(tmp_path, tmp_path / "r/report.html", "--dump-dom", f"--window-size={width},900")
    probe = re.search(r'<pre id="probe">(.*?)</pre>', dom, re.S)
    assert probe, dom[-2000:]
    out = json.loads(Page(f"<script>{probe[1]}</script>").scripts[0].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert out["title"] == out["titleAfter"] == "Two checkpoints" and out["images"] == 0 and out["scripts"] == 2 and out["overflow"] <= 0
    assert out["sections"] == [
        "Leaderboard: FRS", "Accuracy against quality", "How it depends on K", "Confidence against quality", "The four dimensions",
        "Leaderboard: baseline: rules, no FRS", "Accuracy against quality", "How it depends on K", "All figures", "What the filter selected",
        "Comparison", "Traces",
    ]  # fmt: skip
    assert len(out["marks"]) == 6 and min(out["marks"]) > 0 and out["marks"][0] == 4
    assert out["comparison"][0] == "Two models on one benchmark" and out["comparison"][-1] == "a part of tomorrow" and out["pairs"] == 2
    assert out["all"] == 100 and out["sorted"] == sorted(out["sorted"], reverse=True)  # the first hundred
    assert out["worst"] == sorted(out["worst"]) and set(out["right"]) == {1.0} and min(out["high"]) >= 0.75 and set(out["kept"]) == {True}
    assert set(out["found"]) == {"sums-0"} and out["none"] == "No trace matches."
    assert out["trace"] and out["low"] == out["wantLow"] and NASTY in out["shown"]
    assert out["tips"][0].endswith("which the confidence is taken from") and "rgb" in out["shade"] and out["tips"][1].startswith("p = 0.9")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_screenshots_are_drawn_in_light_and_dark(tmp_path, scheme):
    chromium()
    image_of = pytest.importorskip("PIL.Image")
    written(tmp_path)
    shot = tmp_path / "shot.png"
    preferred = f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"
    browse(tmp_path, tmp_path / "r/report.html", f"--screenshot={shot}", "--window-size=900,1400", preferred)
    with image_of.open(shot) as image:
        colours = image.convert("RGB").getcolors(1 << 20) or []
    most = max(colours)[1]
    assert image.size == (900, 1400) and len(colours) > 300 and (sum(most) > 700 if scheme == "light" else sum(most) < 120), most


def test_the_page_says_what_it_is_without_a_script():
    assert "report.md and report.json" in page(page_data(made()[0]))
