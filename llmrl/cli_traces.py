"""The commands on traces and checkpoints: sample, import-traces, score, robustness build. cli.py registers them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout, nothing else.")]

# What import-traces and `score --use frs` both let say about the files of other programs.
Format = Annotated[str | None, typer.Option("--format", help="Files of others: auto (default), traces, run, openai, vllm, lm-eval, lighteval, rows")]
Column = Annotated[list[str] | None, typer.Option(help="Plain rows: FIELD=COLUMN, e.g. response=output gold=meta.answer; several times")]
Logprobs = Annotated[str | None, typer.Option(help="What the file's log-probs are: raw (softmax at temperature 1, nothing cut), sampled, auto (default)")]
Join = Annotated[Path | None, typer.Option(help="Rows with id or custom_id that add prompts and gold answers, e.g. a batch's input")]
AnswerAfter = Annotated[str | None, typer.Option(help='The gold answer is what follows this mark, e.g. "####"')]
ScoreKey = Annotated[str | None, typer.Option(help="lm-eval, lighteval: the metric that is the score")]
Filter = Annotated[str | None, typer.Option("--filter", help="lm-eval: the filter whose rows are taken")]
Steps = Annotated[str | None, typer.Option(help="Run directories: first and last step, e.g. 10-20")]
OnBad = Annotated[str | None, typer.Option(help="Rows that are no traces: refuse (default), or drop (counted)")]


def sample(
    model: Annotated[str, typer.Argument(help="A transformers folder, a Hub id, smollm2, or a run directory (its last checkpoint)")],
    data: Annotated[str, typer.Option("--data", help="A .jsonl/.jsonl.gz/.parquet/.csv file, hub:NAME, gym:TASK, or a generator such as chains")],
    out: Annotated[Path, typer.Option("--out", help="traces.jsonl.gz; an interrupted file is continued")],
    n: Annotated[int, typer.Option("-n", min=1, help="Samples a prompt")] = 1,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 = greedy")] = 1.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends a response; may be given several times")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first rows only")] = None,
    template: Annotated[str | None, typer.Option(help='User message made from the row, e.g. "{prompt}\\nThink step by step."')] = None,
    system: Annotated[str | None, typer.Option(help="System message")] = None,
    answer_after: Annotated[str | None, typer.Option(help='The gold answer is what follows this mark, e.g. "####"')] = None,
    args: Annotated[str, typer.Option(help="JSON object: keywords of a generator, Hub dataset or reasoning-gym task")] = "{}",
    split: Annotated[str | None, typer.Option(help="Split of a Hub dataset")] = None,
    verifier: Annotated[str | None, typer.Option(help="Grade the responses: math_answer, numeric, ./mine.py:f, ...")] = None,
    verifier_args: Annotated[str, typer.Option(help="JSON object: keywords of the verifier")] = "{}",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    engine: Annotated[str | None, typer.Option(help="hf, or vllm: running servers, which MODEL names the tokenizer of")] = None,
    server: Annotated[list[str] | None, typer.Option(metavar="URL", help="A vLLM server; several share the work")] = None,
    self_certainty: Annotated[bool, typer.Option("--self-certainty", help="Add that column, for `score --confidence self_certainty`; a pass more")] = False,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    transport: Annotated[str | None, typer.Option(help="vgf: move the samples along a reward model's gradient; docs/vgf.md")] = None,
    reward_model: Annotated[str | None, typer.Option(metavar="FOLDER", help="--transport: what is followed; `llmrl reward` makes one")] = None,
    flow_steps: Annotated[int, typer.Option("-L", "--flow-steps", min=0, help="--transport: steps; 0 = best-of-N")] = 4,
    eps: Annotated[float, typer.Option(min=0.0, help="--transport: step size, in distances to a token's nearest neighbour")] = 1.0,
    velocity: Annotated[str, typer.Option(help="--transport: independent, svgd, pooled")] = "independent",
    candidates: Annotated[int, typer.Option(min=0, help="--transport: decode among the model's so many likeliest tokens; 0 = all")] = 0,
    guard: Annotated[float, typer.Option(help="--transport: nats per token a text may become less likely; below 0 = no guard")] = 0.5,
    second_reward: Annotated[str | None, typer.Option(metavar="FOLDER", help="--transport: another reward model that only looks on")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew where --out exists")] = False,
    json_: Json = False,
) -> None:  # fmt: skip
    """Sample n responses to every prompt, with token log-probs, to a trace file that `llmrl score` reads."""
    from llmrl.records import InputError
    from llmrl.sampling import sample_file

    if engine not in (None, "hf", "vllm") or (engine == "vllm") > bool(server) or (engine == "hf" and server):
        raise InputError(f"--engine {engine}: expected hf, or vllm with --server http://HOST:PORT (several times for several)")
    how: dict[str, Any] = {
        "n": n, "temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens, "stop": tuple(stop or ()), "limit": limit,
        "template": template, "system": system, "answer_after": answer_after, "args": parse_json("--args", args), "split": split, "verifier": verifier,
        "verifier_args": parse_json("--verifier-args", verifier_args), "dtype": dtype, "seed": seed, "resume": not restart, "quiet": json_,
        "servers": tuple(server or ()),
    }  # fmt: skip
    if transport is not None or reward_model is not None or second_reward is not None:
        from llmrl.transport_sampling import chosen, summary, transport_file

        if self_certainty:
            raise InputError("--self-certainty is not for samples that --transport moves: leave one of them out")

        move = chosen(transport, reward_model, flow_steps, eps, velocity, candidates, guard)
        result = transport_file(model, data, out, move, reward_model=str(reward_model), second_reward=second_reward, **how)
        tell(result, json_, summary(result))
        return
    result = sample_file(model, data, out, certainty=self_certainty, **how)
    tell(result, json_, f"{result['new']} new traces, {result['traces']} in all -> {out}")


def import_traces(
    files: Annotated[list[Path], typer.Argument(help="Run directories, OpenAI or vLLM logs, lm-eval or lighteval samples, plain rows")],
    out: Annotated[Path, typer.Option("--out", help="traces.jsonl.gz to write")],
    format_: Format = None,
    column: Column = None,
    model: Annotated[str | None, typer.Option(help="The name that the traces carry, whatever the file says")] = None,
    logprobs: Logprobs = None,
    join: Join = None,
    answer_after: AnswerAfter = None,
    score_key: ScoreKey = None,
    filter_: Filter = None,
    steps: Steps = None,
    on_bad: OnBad = None,
    score_with: Annotated[str | None, typer.Option(help="Fill missing raw_logprobs from this model, the one that wrote the texts")] = None,
    dtype: Annotated[str, typer.Option(help="--score-with: float32 or bfloat16")] = "float32",
    json_: Json = False,
) -> None:  # fmt: skip
    """Make a trace file of the files of other programs; says what was dropped, what is missing and what to do about it."""
    from llmrl.importing import choices, import_files

    how = choices(format_, column, logprobs, join, answer_after, score_key, filter_, steps, on_bad)
    result = import_files(files, out, score_with=score_with, dtype=dtype, quiet=json_, model=model, **how)
    text = result.pop("text")
    tell(result, json_, f"{text}\n{result['traces']} traces -> {out}")


def score(
    traces: Annotated[list[Path], typer.Argument(help="Trace files of `llmrl sample`; models with --use robustness; frs: or MODEL@BENCHMARK=FILE")],
    use: Annotated[str, typer.Option("--use", help="The evaluator: passk, frs, robustness, or a reference to one")] = "passk",
    k: Annotated[list[int] | None, typer.Option("-k", "--k", min=1, help="The k of pass@k; frs: percent of the pool that is kept, default 10")] = None,
    resamples: Annotated[int | None, typer.Option(min=1, help="Bootstrap resamples; default 2000, with frs 10000")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Default 0, with frs 42")] = None,
    verifier: Annotated[str | None, typer.Option(help="Grade traces that carry no score: math_answer, numeric, ...")] = None,
    verifier_args: Annotated[str, typer.Option(help="JSON object: keywords of the verifier")] = "{}",
    set_: Annotated[Path | None, typer.Option("--set", help="robustness: the frozen test set of `llmrl robustness build`")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="robustness, frs: folder for the report and its sources; default ./robustness, ./frs")] = None,
    drift: Annotated[bool, typer.Option("--drift/--no-drift", help="robustness: KL, CKA and weight distance to the set's base")] = True,
    base: Annotated[str | None, typer.Option("--base", help="robustness: where the set's base model is now, for drift")] = None,
    dtype: Annotated[str, typer.Option(help="robustness, --score-with: float32 or bfloat16")] = "float32",
    judge_url: Annotated[list[str] | None, typer.Option(help="frs: an OpenAI-compatible endpoint, e.g. http://localhost:8000/v1; one, or one a judge")] = None,
    judge_model: Annotated[list[str] | None, typer.Option(help="frs: the judge's name there; several may be given, the first leads")] = None,
    judge_key_env: Annotated[str | None, typer.Option(help="frs: environment variable that holds the API key")] = None,
    judge_format: Annotated[str | None, typer.Option(help="frs: json_schema (default), json_object or none: how the endpoint is told the reply's form")] = None,
    judge_cache: Annotated[str | None, typer.Option(help='frs: folder of replies, shared by runs; "" keeps none; default ~/.cache/llmrl/judge')] = None,
    judge_calls: Annotated[int | None, typer.Option("--concurrency", min=1, help="frs: calls in flight; default 16")] = None,
    judge_timeout: Annotated[float | None, typer.Option(min=1, help="frs: seconds for a judgement, retries and waiting included; default 120")] = None,
    blind: Annotated[bool, typer.Option("--blind", help="frs: the judge sees neither gold answer nor verdict")] = False,
    both: Annotated[bool, typer.Option("--both", help="frs: the paper's judge and the blind one, side by side")] = False,
    reasons: Annotated[bool, typer.Option("--reasons", help="frs: the judge also writes why; its numbers then are of another contract")] = False,
    baseline: Annotated[bool, typer.Option("--baseline", help="frs: also the scorer without a language model, which is no FRS")] = False,
    confidence: Annotated[str | None, typer.Option(help="frs: tail_mean (default), mean_logprob, self_certainty, answer_prob or vote_share")] = None,
    tail: Annotated[float | None, typer.Option(min=0.1, max=100, help="frs: percent of the tokens that tail_mean looks at; default 10")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="frs: cut repeated tails before confidence is taken; drop no row")] = False,
    sampled_logprobs: Annotated[bool, typer.Option("--sampled-logprobs", help="frs: take `logprobs` where a trace has no raw_logprobs")] = False,
    special_id: Annotated[list[int] | None, typer.Option(help="frs: a token id that confidence leaves out, such as the end token's")] = None,
    per_problem: Annotated[bool, typer.Option("--per-problem", help="frs: filter within each problem, not over one pool")] = False,
    subsample: Annotated[int | None, typer.Option(min=0, help="frs: traces of each tenth of the pool to judge, default 50; 0 = all")] = None,
    top_half: Annotated[bool, typer.Option("--top-half", help="frs: judge the paper's five bins only: no unfiltered mean, half the calls")] = False,
    selection: Annotated[int | None, typer.Option(min=0, help="frs: problems whose most confident and one random trace are judged for the gain; 0")] = None,
    over: Annotated[str | None, typer.Option(help="frs: the bootstrap draws traces (default, the paper) or problems")] = None,
    max_calls: Annotated[int | None, typer.Option(min=1, help="frs: calls of the whole job, at most, over all judges and restarts")] = None,
    max_usd: Annotated[float | None, typer.Option(min=0, help="frs: USD of the whole job, at most")] = None,
    usd_per_mtok: Annotated[str | None, typer.Option(metavar="IN,OUT", help="frs: the judge's prices, USD per million tokens")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="frs: print calls, tokens and cost; ask nothing")] = False,
    human: Annotated[Path | None, typer.Option(help="frs: people's scores, rows {id, faithfulness, utility, coherence, factuality, rater?}")] = None,
    format_: Format = None,
    column: Column = None,
    logprobs: Logprobs = None,
    join: Join = None,
    answer_after: AnswerAfter = None,
    score_key: ScoreKey = None,
    filter_: Filter = None,
    steps: Steps = None,
    on_bad: OnBad = None,
    score_with: Annotated[list[str] | None, typer.Option(help="Fill missing raw_logprobs from the model that wrote the texts; one, or one a file")] = None,
    json_: Json = False,
) -> None:  # fmt: skip
    """Score trace files: unbiased pass@k, mean@k, majority vote, truncation and no-answer rates, with bootstrap intervals.

    With --use robustness: models (folders, Hub ids, run directories) on a frozen set; the first is the one the others are compared with.
    With --use frs: the Filtered Reasoning Score of every file, compared, with a report; a killed command goes on where it was. The options
    from --format on say what files of other programs hold, as with `llmrl import-traces`.
    """
    from rich.console import Console

    asked = {
        "urls": judge_url, "models": judge_model, "key_env": judge_key_env, "structured": judge_format, "cache": judge_cache, "concurrency": judge_calls,
        "timeout_s": judge_timeout,
        "blind": blind, "both": both, "reasons": reasons, "baseline": baseline, "confidence": confidence, "tail": tail, "strict": strict,
        "sampled": sampled_logprobs, "special_ids": special_id, "per_problem": per_problem, "subsample": subsample, "top_half": top_half,
        "selection": selection, "over": over,
        "max_calls": max_calls, "max_usd": max_usd, "usd_per_mtok": usd_per_mtok, "dry_run": dry_run, "human": human,
        "format": format_, "column": column, "logprobs": logprobs, "join": join, "answer_after": answer_after, "score_key": score_key, "filter": filter_,
        "steps": steps, "on_bad": on_bad, "score_with": score_with,
    }  # fmt: skip
    asked = {name: tuple(value) if isinstance(value, list) else value for name, value in asked.items() if value is not None and value is not False}
    asked = {name: value for name, value in asked.items() if value != ()}
    if use == "frs":
        _score_frs([str(t) for t in traces], {**asked, "out": out, "k": tuple(k or ()), "resamples": resamples, "seed": seed, "dtype": dtype,
                   "verifier": verifier, "verifier_args": parse_json("--verifier-args", verifier_args)}, json_)  # fmt: skip
        return
    if asked:
        from llmrl.records import InputError

        raise InputError(f"{', '.join(asked)}: these options go with --use frs")
    resamples, seed = resamples or 2000, seed or 0
    if use == "robustness":
        from llmrl.robustness import refuse_unused, score_models

        file, out = refuse_unused(set_, k=k, verifier=verifier), out or Path("robustness")
        report = score_models(
            [str(t) for t in traces], file, out, resamples=resamples, seed=seed, dtype=dtype, drift=drift, base=base, quiet=json_
        )  # fmt: skip
        if json_:
            tell(report.to_json(), True, "")
        else:
            Console(highlight=False).print(report.table(), *report.notes(), f"wrote {out / 'report.json'} and {out / 'report.png'}", sep="\n", soft_wrap=True)
        return
    from llmrl.sampling import score_files

    if set_ is not None:
        from llmrl.records import InputError

        raise InputError("--set goes with --use robustness")
    graded_by = parse_json("--verifier-args", verifier_args)
    results = score_files(traces, use, ks=k or None, resamples=resamples, seed=seed, verifier=verifier, verifier_args=graded_by)
    if json_:
        tell({str(path): r.to_json() for path, r in results.items()}, True, "")
        return
    for path, result in results.items():
        Console().print(str(path), result.table(), sep="\n")


def _score_frs(files: list[str], asked: dict[str, Any], as_json: bool) -> None:
    from rich.console import Console

    from llmrl.score_frs import cost_table, make_ask, score_frs

    outcome = score_frs(files, make_ask(asked), quiet=as_json)
    if as_json:
        tell(outcome.to_json(), True, "")
        return
    console = Console(highlight=False)
    if outcome.costs is not None:
        console.print(cost_table(outcome.costs))
        return
    for result in outcome.results:
        console.print(result.table())
    for table in outcome.comparison.tables() if len(outcome.results) > 1 else ():
        console.print(table)
    console.print(*outcome.notes, "wrote " + ", ".join(map(str, outcome.files)), sep="\n", soft_wrap=True, markup=False)


robustness = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The frozen test set of `llmrl score --use robustness`.")


@robustness.command("build")
def robustness_build(
    model: Annotated[str, typer.Argument(help="The base: a transformers folder, a Hub id, smollm2, or a run directory (its last checkpoint)")],
    data: Annotated[str, typer.Option("--data", help="Problems, as for `llmrl sample`")],
    out: Annotated[Path, typer.Option("--out", help="The set to write, e.g. set.jsonl.gz")],
    verifier: Annotated[str, typer.Option(help="Judges every answer, now and in every evaluation on the set")] = "math_answer",
    verifier_args: Annotated[str, typer.Option(help='JSON object, e.g. {"after": "#"} for exact')] = "{}",
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first rows only")] = None,
    template: Annotated[str | None, typer.Option(help='User message made from the row, e.g. "{prompt}\\nThink step by step."')] = None,
    system: Annotated[str | None, typer.Option(help="System message")] = None,
    answer_after: Annotated[str | None, typer.Option(help='The gold answer is what follows this mark, e.g. "####"')] = None,
    args: Annotated[str, typer.Option(help="JSON object: keywords of a generator, Hub dataset or reasoning-gym task")] = "{}",
    split: Annotated[str | None, typer.Option(help="Split of a Hub dataset")] = None,
    n: Annotated[int, typer.Option("-n", min=1, help="Samples of every context in an evaluation")] = 8,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.6,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 0.95,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 512,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends a response; may be given several times")] = None,
    solve_samples: Annotated[int, typer.Option(min=1, help="Samples of the base a problem")] = 8,
    solve_min: Annotated[int, typer.Option(min=1, help="Right ones among them that a problem needs, to be corrupted")] = 7,
    r: Annotated[list[float], typer.Option("--r", help="Relative positions of the corrupted step")] = [0.1, 0.3, 0.5, 0.7],  # noqa: B006
    m: Annotated[list[float], typer.Option("--m", help="Shares of the own trace kept before foreign text")] = [0.0, 0.2, 0.4, 0.6, 0.8],  # noqa: B006
    cut: Annotated[str | None, typer.Option("--cut", help='What ends a step, e.g. ";"; default blank lines, lines or sentences')] = None,
    answer_mark: Annotated[str | None, typer.Option(help='What the answer begins with, e.g. "#"; default a box or an answer phrase')] = None,
    min_step_tokens: Annotated[int | None, typer.Option(min=1, help="Shorter steps are joined; default 8, with --cut 1")] = None,
    min_edits: Annotated[int | None, typer.Option(min=1, help="Token edits of a polluter's step, at least; default 3, with --cut 1")] = None,
    coherence_nats: Annotated[float, typer.Option(min=0.0, help="Mean NLL a polluter's step may have above the original steps' 99th percentile")] = 1.0,
    proxy: Annotated[bool, typer.Option("--proxy/--no-proxy", help="Keep only corruptions that mislead the base's greedy continuation")] = True,
    kind: Annotated[list[str] | None, typer.Option(help="Kinds of perturbed prompts; default all")] = None,
    polluter: Annotated[list[str], typer.Option(help="Frozen polluters: base, or a model; none = rule-based edits only")] = ["base"],  # noqa: B006
    polluter_template: Annotated[str, typer.Option(help="Template of the polluter's prompt: chat, tiny, ./mine.txt")] = "chat",
    step_open: Annotated[str, typer.Option(help='What is put behind the polluter\'s prompt; "" with the tiny template')] = "<step>",
    step_close: Annotated[str, typer.Option(help='What ends the polluter\'s reply; "!" with the tiny template')] = "</step>",
    pollutions: Annotated[int, typer.Option(min=1, help="Tries of a polluter at a step")] = 4,
    correction: Annotated[list[str] | None, typer.Option(help='A sign of explicit correction in the task\'s own language, e.g. "~"')] = None,
    diagnose_template: Annotated[str, typer.Option(help="Template that asks for the first wrong step: chat, ./mine.txt")] = "chat",
    diagnose: Annotated[int, typer.Option(min=0, help="Wrong, and as many right, solutions to diagnose, of each source")] = 100,
    processbench: Annotated[Path | None, typer.Option(help="ProcessBench rows to diagnose, .jsonl(.gz)")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file")] = False,
    json_: Json = False,
) -> None:  # fmt: skip
    """Build a test set from a base model and freeze it: contexts to recover from, solutions to diagnose, perturbed prompts, base traces."""
    from llmrl.records import Sampling
    from llmrl.robustness import build_set, summary

    result = build_set(
        model, data, out, limit=limit, template=template, system=system, answer_after=answer_after, args=parse_json("--args", args), split=split,
        verifier=verifier, verifier_args=parse_json("--verifier-args", verifier_args),
        sampling=Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, stop=tuple(stop or ())), samples=n,
        solve_samples=solve_samples, solve_min=solve_min, r=r, m=m, cut=cut, answer_mark=answer_mark, min_step_tokens=min_step_tokens,
        min_edits=min_edits, coherence_nats=coherence_nats, proxy=proxy, kinds=kind or (), polluters=[p for p in polluter if p != "none"],
        polluter_template=polluter_template, delimiters=(step_open, step_close), corrections=correction or (), pollutions=pollutions,
        diagnose_template=diagnose_template, diagnose=diagnose, processbench=processbench,
        dtype=dtype, seed=seed, overwrite=overwrite,
    )  # fmt: skip
    tell(result, json_, summary(result))


def tell(result: dict[str, Any], as_json: bool, line: str) -> None:
    from llmrl.console import out

    out(json.dumps(result) if as_json else line)


def parse_json(option: str, text: str) -> dict[str, Any]:
    from llmrl.records import InputError

    try:
        value = json.loads(text)
    except json.JSONDecodeError as e:
        raise InputError(f"{option}: not JSON: {e}") from e
    if not isinstance(value, dict):
        raise InputError(f'{option}: {text!r} is no JSON object; write e.g. {{"rows": 100}}')
    return value
