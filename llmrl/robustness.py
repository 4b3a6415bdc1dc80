"""What `llmrl robustness build` and `llmrl score --use robustness` do: models, templates and files around the protocols in evaluation/."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrl import plugins
from llmrl.records import InputError, Prompt, Request, Sampling
from llmrl.sampling import EVALUATORS, model_folder
from llmrl.templates import Template, read_template

if TYPE_CHECKING:
    from llmrl.models import Policy

OWN_TEMPLATES = Path(__file__).parent / "evaluation" / "templates"


def build_set(
    model: str, data: str, out: Path, *, limit: int | None, template: str | None, system: str | None, answer_after: str | None, args: dict[str, Any],
    split: str | None, verifier: str, verifier_args: dict[str, Any], sampling: Sampling, samples: int, solve_samples: int, solve_min: int,
    r: Sequence[float], m: Sequence[float], cut: str | None, answer_mark: str | None, min_step_tokens: int | None, min_edits: int | None,
    coherence_nats: float, proxy: bool, kinds: Sequence[str], polluters: Sequence[str], polluter_template: str, delimiters: tuple[str, str], pollutions: int,
    corrections: Sequence[str],
    diagnose_template: str, diagnose: int, processbench: Path | None, dtype: str, seed: int, overwrite: bool,
) -> dict[str, Any]:  # fmt: skip
    """Reads and checks everything, only then loads the base (and the polluters), builds, writes, and reads the file back."""
    from llmrl.data import read_prompts
    from llmrl.scoring import Scorer

    if out.exists() and not overwrite:
        raise InputError(f"{out} exists; a set is built once and then kept. Name another file, or give --overwrite")
    Options, Cut, Gate = (evaluator(n) for n in ("robustness_items:Options", "corruptions:Cut", "corruptions:Gate"))
    known = evaluator("perturb:perturb").__globals__["KINDS"]
    if wrong := sorted(set(kinds) - set(known)):
        raise InputError(f"--kind {wrong[0]}: there are {', '.join(known)}")
    if not 1 <= solve_min <= solve_samples:
        raise InputError(f"--solve-min {solve_min} with --solve-samples {solve_samples}: expected 1 <= solve-min <= solve-samples")
    for name, values, low in (("--r", r, 0.0), ("--m", m, 0.0)):
        if any(not low <= v < 1 for v in values) or len(set(values)) < len(values):
            raise InputError(f"{name} {list(values)}: expected different numbers from 0 to below 1")
    options = Options(
        sampling=sampling, samples=samples, solve_samples=solve_samples, solve_min=solve_min, r=tuple(sorted(r)), m=tuple(sorted(m)),
        cut=Cut(cut or None, answer_mark or None, min_step_tokens or (1 if cut else 8)),
        gate=Gate(min_edits=min_edits or (1 if cut else 3), marks=tuple(corrections)), corrections=tuple(corrections),
        coherence_nats=coherence_nats, proxy=proxy, kinds=tuple(kinds) or known, diagnose=diagnose, seed=seed,
    )  # fmt: skip
    pollute_as = read_template(polluter_template, kind="gasp_polluter", fields=("prefix", "step"), base=Path.cwd(), needs=("question", "step"))
    own = OWN_TEMPLATES / f"diagnose_{diagnose_template}.txt"
    diagnose_as = read_template(str(own) if own.is_file() else diagnose_template, kind="diagnose", fields=("steps",), base=Path.cwd(), needs=("steps",))
    prompts = read_prompts(data, base=Path.cwd(), split=split, args=args, template=template, system=system, answer_after=answer_after, limit=limit).prompts
    rows = _jsonl(processbench) if processbench else []
    with Scorer(verifier, verifier_args, Path.cwd()) as scorer:
        base = _policy(model, dtype)
        subject = _subject(model, base)
        how = Sampling(max_new_tokens=options.gate.max_tokens + 16, temperature=1.0, stop=(delimiters[1],))
        pollute = {}
        for i, name in enumerate(polluters):
            who = subject if name == "base" else _subject(name, _policy(name, dtype))
            label = "polluter" if len(polluters) == 1 else f"polluter{i + 1}"
            pollute[label] = make_polluter(who, pollute_as, delimiters, pollutions, how, seed)
        builder = evaluator("robustness_build:Builder")(
            subject, scorer.score, options, pollute, lambda prompt, steps: diagnose_as.messages(prompt, steps=steps)
        )
        header, problems, items, traces = builder.build(prompts, rows)
    header["verifier"] = {"use": verifier, "args": verifier_args}
    header["data"] = {"path": data, "args": args, "limit": limit, "split": split, "template": template, "system": system, "answer_after": answer_after}
    header["polluters"] = dict(zip(pollute, polluters, strict=True))
    header["templates"] = {"polluter": pollute_as.user, "diagnose": diagnose_as.user}
    header["base_weights"] = evaluator("drift:weights_digest")(base.model.named_parameters())
    header["processbench"] = str(processbench) if processbench else None
    suite = evaluator("robustness_set:write_set")(out, header, problems, items, traces)
    return {"out": str(out)} | {k: v for k, v in suite.header.items() if k in ("sha256", "problems", "items", "traces", "solved", "shares", "left_out")}


def make_polluter(subject: Any, template: Template, delimiters: tuple[str, str], n: int, how: Sampling, seed: int) -> Any:
    """(prompt, prefix, step) of every site -> n candidate steps each, all sampled in one call; as the rule `gasp` asks its polluter.

    The first delimiter is put behind the prompt, the second ends the reply; a reply without it is None.
    """

    def pollute(sites: Sequence[tuple[Prompt, str, str]]) -> list[list[str | None]]:
        asked: list[Request | None] = []
        for k, (prompt, prefix, step) in enumerate(sites):
            messages = template.messages(prompt, prefix=prefix, step=step)
            context = None if subject.cannot(messages) else (*subject.chat.prompt_ids(messages), *subject.encode(delimiters[0]))
            asked += [Request(context, ("robustness", seed, "pollute", prompt.id, k, i), how) if context else None for i in range(n)]
        parts = [None if c is None else c.text.partition(delimiters[1]) for c in subject.generate(asked)]
        said = [None if p is None or not p[1] else p[0] for p in parts]
        return [said[k * n : (k + 1) * n] for k in range(len(sites))]

    return pollute


def summary(result: dict[str, Any]) -> str:
    """What a built set holds and what was left out, for people."""
    solved = result["solved"]
    lines = [f"{result['out']}: {result['items']} items of {result['problems']} problems, {result['traces']} base traces, sha256 {result['sha256'][:12]}"]
    lines += [f"the base solves {solved['solved']} of {solved['problems']} problems in at least {solved['least']} of {solved['of']} samples"]
    for source, counts in result["shares"].items():
        lines.append(f"{source}: " + ", ".join(f"{n} {what}" for what, n in counts.items()))
    lines += [f"left out of {kind}: {n} ({why})" for kind, reasons in result["left_out"].items() for why, n in reasons.items()]
    return "\n".join(lines)


def refuse_unused(file: Path | None, *, k: Sequence[int] | None, verifier: str | None) -> Path:
    """The set's path. Raises InputError without one, and for options that --use robustness would not read."""
    if file is None:
        raise InputError("--use robustness needs --set FILE, a test set of `llmrl robustness build`")
    if k or verifier is not None:
        raise InputError(f"{'-k' if k else '--verifier'}: with --use robustness the set holds the sampling and the verifier; leave it out")
    return file


def score_models(
    models: Sequence[str], file: Path, out: Path, *, resamples: int, seed: int, dtype: str, drift: bool, base: str | None, quiet: bool
) -> Any:
    """Every model on the set, one at a time; writes report.json, report.png and the answers to `out` and returns the report."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from llmrl.scoring import Scorer

    suite = evaluator("robustness_set:read_set")(file)
    names = evaluator("robustness_report:short_names")(models)
    judge = suite.header["verifier"]
    sheets, moved = [], {}
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(), TextColumn("contexts"), TimeRemainingColumn())
    origin: Any = None
    with Scorer(judge["use"], judge["args"], Path.cwd()) as scorer, Progress(*columns, console=Console(stderr=True), disable=quiet) as bar:
        for name, model in zip(names, models, strict=True):
            task = bar.add_task(name, total=len(suite.items))
            policy = _policy(model, dtype)
            sheet = evaluator("robustness:ask")(
                _subject(model, policy), suite, scorer.score, seed=seed, each=lambda n, task=task: bar.update(task, completed=n)
            )
            sheets.append(sheet)
            if drift:
                origin = origin or _base(base or suite.header["base"], suite, dtype)
                moved[model] = origin if isinstance(origin, str) else _drift(origin, policy, suite, sheet.same_tokenizer)
            del policy
    found = evaluator("robustness:figures")(suite, sheets, resamples=resamples, seed=seed)
    settings = {"set": str(file), "seed": seed, "resamples": resamples, "dtype": dtype} | {k: suite.header[k] for k in ("sampling", "samples")}
    report = evaluator("robustness_report:Report")(suite, sheets, found, moved, settings)
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(report.to_json(), indent=1), encoding="utf-8")
    report.draw(out / "report.png")
    for i, sheet in enumerate(sheets):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in evaluator("robustness:answers_json")(sheet))
        (out / f"answers-{i}.jsonl.gz").write_bytes(gzip.compress(lines.encode(), 6, mtime=0))
    return report


def _base(model: str, suite: Any, dtype: str) -> Any:
    """The base's policy for drift, or why there is none: a base that has been trained on in place is not the base."""
    try:
        policy = _policy(model, dtype)
    except InputError as error:
        return f"the base cannot be loaded ({error}); name it with --base"
    if dtype == "float32" and evaluator("drift:weights_digest")(policy.model.named_parameters()) != suite.header["base_weights"]:
        return f"{model} has other weights than when the set was built; name the base with --base"
    return policy


def _drift(base: Policy, policy: Policy, suite: Any, same_tokenizer: bool) -> dict[str, Any] | str:
    if not same_tokenizer:
        return "another tokenizer than the base's: no common token positions"
    return evaluator("drift:drift")(_lens(base), _lens(policy), [(t.context_ids, t.token_ids) for t in suite.traces])


def _lens(policy: Policy) -> Any:
    """The model's own forward: the packed attention of training keeps no hidden states."""
    import torch

    from llmrl.attention import NAME

    def hidden(ids: Sequence[int]) -> list[Any]:
        model = policy.model
        training = model.training
        model.eval()
        model.set_attn_implementation("sdpa")
        try:
            out = model.base_model(input_ids=torch.tensor([list(ids)], device=policy.device), use_cache=False, output_hidden_states=True)
        finally:
            model.set_attn_implementation(NAME)
            model.train(training)
        return [*(h[0] for h in out.hidden_states[1:-1]), out.last_hidden_state[0]]

    return evaluator("drift:Lens")(hidden, policy.logits, policy.model.named_parameters)


def _policy(model: str, dtype: str) -> Policy:
    import torch

    from llmrl.models import load_policy
    from llmrl.recipe import Model

    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"--dtype {dtype}: expected float32 or bfloat16")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_policy(Model(path=model_folder(model), dtype=dtype), base=Path.cwd(), device=device)  # type: ignore[arg-type]


def _subject(name: str, policy: Policy) -> Any:
    from llmrl.hf_engine import HFEngine

    return evaluator("robustness_set:Subject")(name, HFEngine(policy), policy.chat)


def _jsonl(path: Path) -> list[dict[str, Any]]:
    from llmrl.sources import open_source

    _, rows = open_source(str(path), base=Path.cwd())
    found = [row.cells for row in rows if row.cells is not None]
    if not found or not {"id", "problem", "steps", "first_error_step"} <= set(found[0]):
        raise InputError(f"{path}: expected ProcessBench rows with id, problem, steps and first_error_step")
    return found


def evaluator(ref: str) -> Any:
    """An object of the evaluation layer, "module:name"."""
    return plugins.resolve(f"{EVALUATORS}.{ref}", home=EVALUATORS, base=Path())
