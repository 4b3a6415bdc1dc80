"""`llmrl sample --transport vgf`: samples of every prompt moved along a reward model's gradient (lm_transport), written as traces.

Two files: OUT.sampled.jsonl.gz holds the samples as they were (best-of-N is among them, and another transport may start from it), OUT the moved
ones. A moved trace carries the moved text, no `logprobs` (nobody sampled it), `raw_logprobs` of the policy that was sampled from, and in `extra`
under "transport" what happened: rewards before, flowed and after, changed_share, ref_drop (nats a token), kept, displacement (units of rho), the
sampled text and its score, a second reward model's view, and whether it is the best of its prompt by the reward of its decoded tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Literal

from llmrl import plugins
from llmrl.records import InputError, Prompt, Verdict

EVALUATION = "llmrl.evaluation"
PROMPTS = 32
"""Prompts that are moved together."""
Score = Callable[[list[tuple[Prompt, str]]], list[Verdict]]


@dataclass(frozen=True)
class Transport:
    """How to move; see lm_transport.transport."""

    steps: int = 4
    """L, the number of flow steps; 0 leaves the samples as they are: best-of-N."""
    eps: float = 1.0
    """Step size, in units of the distance to a token's nearest neighbour."""
    velocity: Literal["independent", "svgd", "pooled"] = "independent"
    alpha: float = 1.0
    optimizer: Literal["plain", "adam"] = "plain"
    guard: float | None = 0.5
    """Nats per token that a text may become less likely under the policy; None = no guard."""
    candidates: int = 0
    """Decode among the policy's so many likeliest tokens; 0 = all."""


def move_traces(
    policy: Any, reward: Any, traces: Iterable[Any], how: Transport, *, second: Any = None, score: Score | None = None, raw: bool = True,
    prompts: int = PROMPTS,
) -> Iterator[Any]:  # fmt: skip
    """The moved traces, in order. Traces of a prompt must follow on each other; `prompts` of them are moved together.

    reward, second: lm_transport.RewardModel. score: a verifier that grades the moved texts. raw: fill raw_logprobs by a teacher-forced pass.
    """
    groups = (list(own) for _, own in groupby(traces, key=lambda t: t.prompt_id))
    waiting: list[list[Any]] = []
    for own in groups:
        waiting.append(own)
        if len(waiting) == prompts:
            yield from _move(policy, reward, waiting, how, second, score, raw)
            waiting = []
    if waiting:
        yield from _move(policy, reward, waiting, how, second, score, raw)


def _move(policy: Any, reward: Any, groups: Sequence[list[Any]], how: Transport, second: Any, score: Score | None, raw: bool) -> Iterator[Any]:
    from llmrl.hf_engine import HFEngine
    from llmrl.lm_transport import best, transport

    part, traces = _part, [t for own in groups for t in own]
    for t in traces:
        if not t.token_ids:
            raise InputError(f"trace {t.id}: no token_ids; transport starts from samples of `llmrl sample`")
    items = [(policy.chat.prompt_ids(_messages(t)), t.token_ids) for t in traces]
    moved = transport(policy, reward, items, **asdict(how))
    after = [(c, m.token_ids) for (c, _), m in zip(items, moved, strict=True)]
    texts = [t.response if m.token_ids == t.token_ids else policy.chat.text(m.token_ids) for t, m in zip(traces, moved, strict=True)]
    verdicts = score([(_prompt(t), text) for t, text in zip(traces, texts, strict=True)]) if score else [None] * len(traces)
    raws = [[float(f"{min(x, 0.0):.7g}") for x in row] for row in HFEngine(policy).score(after)] if raw else [None] * len(traces)
    seconds = list(zip(second.score(items), second.score(after), strict=True)) if second is not None else [None] * len(traces)
    winners, at = set(), 0
    for own in groups:
        winners.add(at + best(moved[at : at + len(own)]))
        at += len(own)
    for k, (t, m, text, v, r, s) in enumerate(zip(traces, moved, texts, verdicts, raws, seconds, strict=True)):
        told: dict[str, Any] = {name: value for name, value in asdict(m).items() if name != "token_ids"}
        told |= {"best": k in winners, "how": asdict(how), "sampled": t.response, "sampled_token_ids": t.token_ids, "sampled_score": t.score}
        if s is not None:
            told |= {"second_before": s[0], "second_after": s[1]}
        judged = {"score": v.score, "status": v.status, "answer": v.answer} if v else {"score": None, "status": None, "answer": None}
        yield replace(
            t, response=text, token_ids=list(m.token_ids), logprobs=None, raw_logprobs=r, tokens=part("sample:token_texts")(m.token_ids, policy.chat.text),
            extra={**t.extra, "transport": told}, **judged,
        )  # fmt: skip


def _part(name: str) -> Any:
    """Plug-in layers are reached by name (DESIGN section 1)."""
    return plugins.resolve(f"{EVALUATION}.{name}", home=EVALUATION, base=Path())


def _messages(trace: Any) -> list[dict[str, str]]:
    return list(trace.messages or ({"role": "user", "content": trace.prompt or ""},))


def _prompt(trace: Any) -> Prompt:
    return Prompt(trace.prompt_id, tuple(_messages(trace)), trace.gold)


def reward_folder(path: str) -> str:
    """A run directory of `llmrl reward` stands for its reward_model; everything else for itself. Raises InputError where there is nothing."""
    folder = Path(path)
    for place in (folder / "reward_model", folder):
        if (place / "config.json").is_file():
            return str(place)
    raise InputError(f"{path}: no sequence-classification folder (no config.json there, nor in reward_model/); make one with `llmrl reward RECIPE`")


def chosen(transport: str | None, reward_model: str | None, steps: int, eps: float, velocity: str, candidates: int, guard: float) -> Transport:
    """The command's options. Raises InputError where they do not fit."""
    if transport != "vgf" or reward_model is None:
        raise InputError(f"--transport {transport} --reward-model {reward_model}: expected --transport vgf with --reward-model FOLDER, or neither")
    if velocity not in ("independent", "svgd", "pooled"):
        raise InputError(f"--velocity {velocity}: expected independent, svgd or pooled")
    return Transport(steps=steps, eps=eps, velocity=velocity, candidates=candidates, guard=None if guard < 0 else guard)  # type: ignore[arg-type]


def sampled_path(out: Path) -> Path:
    """a/b.jsonl.gz -> a/b.sampled.jsonl.gz"""
    stem, dot, rest = out.name.partition(".")
    return out.with_name(f"{stem}.sampled{dot}{rest}")


def transport_file(
    model: str, data: str, out: Path, how: Transport, *, reward_model: str, second_reward: str | None = None, verifier: str | None,
    verifier_args: dict[str, Any], dtype: str, resume: bool, quiet: bool, **sampling: Any,
) -> dict[str, Any]:  # fmt: skip
    """Samples (sampling.sample_file with the remaining keywords), moves, writes both files and returns counts and the means of the diagnostics."""
    from llmrl.lm_transport import RewardModel
    from llmrl.sampling import _on_this_machine, model_folder, sample_file
    from llmrl.scoring import Scorer

    folders = [reward_folder(f) for f in (reward_model, second_reward) if f is not None]
    before = sampled_path(out)
    graded = {"verifier": verifier, "verifier_args": verifier_args}
    sampled = sample_file(model, data, before, dtype=dtype, resume=resume, quiet=quiet, **graded, **sampling)
    policy, _ = _on_this_machine(model_folder(model), dtype)
    reward, *others = (RewardModel.load(f, str(policy.device)) for f in folders)
    scorer = Scorer(verifier, verifier_args, Path.cwd()) if verifier is not None else None
    totals: dict[str, list[float]] = {}
    try:
        with _part("traces:TraceWriter")(out, resume=resume) as writer:
            _same_transport(writer, how, out)
            todo = _unfinished(_part("traces:read_traces")(before), writer.ids)
            new = 0
            for trace in move_traces(policy, reward, todo, how, second=others[0] if others else None, score=scorer.score if scorer else None):
                if trace.id not in writer.ids:
                    writer.write(trace)
                    new += 1
            total = len(writer.ids)
    finally:
        if scorer is not None:
            scorer.close()
    for trace in _part("traces:read_traces")(out):
        _add(totals, trace)
    means = {name: sum(values) / len(values) for name, values in totals.items()}
    return {"out": str(out), "sampled": str(before), "new": new, "traces": total, "prompts": sampled["prompts"], "model": sampled["model"], "means": means}


def _unfinished(traces: Iterable[Any], done: set[str]) -> Iterator[Any]:
    """Whole batches of PROMPTS prompts of which a trace is missing: a batch is moved as in an unbroken run, so its numbers are the same bits."""
    groups = (list(own) for _, own in groupby(traces, key=lambda t: t.prompt_id))
    while batch := list(islice(groups, PROMPTS)):
        if any(t.id not in done for own in batch for t in own):
            yield from (t for own in batch for t in own)


def _same_transport(writer: Any, how: Transport, out: Path) -> None:
    """A file that is continued was moved in one way, or its means mean nothing."""
    then = (writer.first.extra.get("transport") or {}).get("how") if writer.first is not None else None
    if writer.first is not None and then != asdict(how):
        raise InputError(f"{out} was begun with the transport {then}, and now it is {asdict(how)}. Name another --out, or begin anew with --restart")


def _add(totals: dict[str, list[float]], trace: Any) -> None:
    told = trace.extra["transport"]
    row = {k: told[k] for k in ("reward_before", "reward_flowed", "reward_after", "changed_share", "displacement") if k in told}
    row |= {k: told.get(k) for k in ("second_before", "second_after", "sampled_score")} | {"kept": float(told["kept"]), "score": trace.score}
    if told["changed_share"] or not told["kept"]:
        row["ref_drop"] = told["ref_drop"]
    if told["best"]:
        row |= {"best_reward_after": told["reward_after"], "best_score": trace.score}
    for name, value in row.items():
        if value is not None:
            totals.setdefault(name, []).append(float(value))


def summary(result: dict[str, Any]) -> str:
    """What a command prints."""
    m = result["means"]
    lines = [f"{result['new']} new traces, {result['traces']} in all -> {result['out']} (as sampled: {result['sampled']})"]
    lines += [f"  reward {m['reward_before']:.4g} -> flowed {m['reward_flowed']:.4g} -> decoded {m['reward_after']:.4g}; {100 * m['changed_share']:.1f} % of "
              f"tokens changed, {100 * (1 - m['kept']):.1f} % of texts put back by the guard"]  # fmt: skip
    if "second_after" in m:
        lines.append(f"  second reward model {m['second_before']:.4g} -> {m['second_after']:.4g}")
    if "score" in m:
        lines.append(f"  verifier {m.get('sampled_score', float('nan')):.4g} -> {m['score']:.4g}; best of each prompt {m.get('best_score', float('nan')):.4g}")
    return "\n".join(lines)
