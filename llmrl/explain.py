"""`llmrl explain RECIPE`: the checks of a rule that trains on self-explanations, before training; and pairs for its offline DPO form."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from llmrl import plugins
from llmrl.checkpoint import write_atomic
from llmrl.config import LoadedRecipe
from llmrl.records import InputError
from llmrl.rollout import RolloutIO
from llmrl.session import Session, open_session

CHUNK = 64
"""Questions that are sampled side by side."""


def explain(loaded: LoadedRecipe, *, questions: int, pairs: Path | None = None) -> dict[str, Any]:
    """The report on the first `questions` training questions in the order of training, under the recipe's model; with `pairs`, writes that file too."""
    if loaded.recipe.warm_start is not None:
        raise InputError(
            f"{loaded.where('warm_start')}: this looks at the model as training begins. Run the warm start first (llmrl sft RECIPE), then give its model: "
            "model.path=RUN_DIR/model warm_start= (and model.tiny=)"
        )
    session = open_session(loaded, sharded=False)
    try:
        how = getattr(session.rule.collect, "keywords", {}).get("how")
        if how is None:
            raise InputError(f'{loaded.where("rule.use")}: {loaded.recipe.rule.use} as it is set makes no explanations; use "expo" (beta above 0) or "exp_dpo"')
        measure = plugins.resolve("llmrl.rules.expo_report:before_training", home="llmrl.rules", base=Path())
        result = asyncio.run(measure(how, session.stream.take(min(questions, len(session.tables.train))), _io(session)))
        if pairs is not None:
            rows = list(_pairs(session, how))
            write_atomic(pairs, "".join(json.dumps(row) + "\n" for row in rows))
            result["pairs"] = {"file": str(pairs), "written": len(rows), "questions": len(session.tables.train)}
        return result
    finally:
        session.close()


def _io(session: Session) -> RolloutIO:
    r = session.recipe
    return RolloutIO(session.engine, session.scorer, session.policy.chat, session.memory, session.sampling, r.rollout.group, (r.seed, 0), steps=r.steps)


def _pairs(session: Session, how: Any) -> Any:
    make = plugins.resolve("llmrl.rules.expo_report:pair_rows", home="llmrl.rules", base=Path())
    train = session.tables.train
    for a in range(0, len(train), CHUNK):
        yield from asyncio.run(make(how, train[a : a + CHUNK], _io(session)))


def text(result: dict[str, Any]) -> str:
    """The report for people."""

    def number(v: float | None) -> str:
        return "    -" if v is None else f"{v:8.3f}"

    lines = [f"{result['questions']} questions; the model's own samples are right in {_share(result['accuracy'])}", ""]
    lines += [f"{'given the question alone':<24} texts   tokens  NLL a token   log p(answer) after 100 %, 75 %, 50 % of the text"]
    for name, m in result["kinds"].items():
        answers = " ".join(number(v) for v in m["answer_logp"].values())
        lines.append(f"{name:<24} {m['texts']:5d} {m['tokens']:8d}     {number(m['nll_nats'])}   {answers}")
    own, shown, expert = (result["kinds"][k]["nll_nats"] for k in ("own", "explanation", "expert"))
    if shown is not None and own is not None:
        order = f"own {own:.3f}, explanation {shown:.3f}" + (f", expert {expert:.3f}" if expert is not None else "")
        kept = own <= shown and (expert is None or shown < expert)
        lines += ["", f"in distribution: {order}: {'' if kept else 'NOT '}the expected order (own <= explanation < expert)"]
    if result["lift_nats"]:
        lines.append("lift of log p(answer) over own samples: " + ", ".join(f"{v:+.3f} at {k}" for k, v in result["lift_nats"].items()) + " (to be above 0)")
    t = result["tries"]
    ends = ", ".join(f"{k} {v}" for k, v in t.items() if k != "tries")
    lines.append(f"explained: {_share(result['explained_share'])} of the questions; {t['tries']} texts: {ends}")
    lines.append(f"explanations that state the answer before their last step: {_share(result['states_answer_early_share'])}")
    if "pairs" in result:
        lines.append(f"{result['pairs']['written']} pairs of {result['pairs']['questions']} questions -> {result['pairs']['file']}")
    return "\n".join(lines)


def _share(v: float | None) -> str:
    return "-" if v is None else f"{100 * v:.1f} %"
