"""DAgger for agents (arXiv:2605.12913): teacher and student share the turns of an episode, and the teacher labels every state that they visit."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrl import credit as c
from llmrl import losses, plugins
from llmrl.records import Group, InputError, Prompt, Sample
from llmrl.rollout import RolloutIO, plays_episodes
from llmrl.rules.base import Rule, Term

if TYPE_CHECKING:
    from llmrl.episode import Episode

Teacher = Callable[[Prompt, Sequence[dict[str, str]]], Awaitable[str]]
"""(prompt, the conversation so far) -> the teacher's turn."""
KEPT = 4096
"""Labels of earlier steps that are kept for replay, at most."""


def dagger(*, decay: float = 0.9, student_turns: float | None = None, teacher: str | None = None, replay: float = 0.0, base: Path = Path()) -> Rule:
    """Imitation on the states that the student itself comes to: the teacher's action is learnt in every one, whoever acted there. arXiv:2605.12913.

    At each turn of step i (from 0) the teacher acts with probability beta_i = decay^i, else the student;  loss = mean over label tokens of -log p
    The state holds the actions as they were executed, which may differ from the labels. Labels are samples of the role "label"; the episodes themselves
    (role "policy") train nothing and are there for the metrics: the reward is that of the mixture. decay 1 is supervised learning on the teacher's
    episodes, 0 from the second step on relabelling of the student's own.
    student_turns: the AggreVaTe-like form instead: the student plays the first floor(student_turns * i) turns and the teacher completes the episode.
    teacher: a plug-in, "./teacher.py:make", whose factory gives `async (prompt, messages) -> text`; None = the environment's own expert(). Either has the
    environment's deadline. Needs an [environment]. replay: labels of earlier steps (all ranks) for each new one, drawn at random; they stay labels of states
    that older mixtures visited. Metrics: rule/beta, rule/agreed (turns in which the student wrote the teacher's text), rule/labels.
    Differs from the paper: beta decays once a step. OUR CHOICE: decay 0.9 and its form (the paper: beta decays to 0), replay 0, one label a state.
    Differs from grpo: no advantage, cross-entropy on labels only.
    """
    if not 0 <= decay <= 1 or replay < 0 or (student_turns is not None and student_turns < 0):
        raise ValueError(f"dagger: decay = {decay} must lie in [0, 1]; replay = {replay} and student_turns = {student_turns} at least 0")
    ask = plugins.use(teacher, {}, home="llmrl.rules", base=base, where="[rule] teacher") if teacher else None
    return Rule(
        credit=c.Credit(), loss=(Term(losses.ce(), weight="label", name="label"),),
        collect=partial(labelled_groups, decay=decay, student_turns=student_turns, teacher=ask, replay=replay),
    )  # fmt: skip


dagger.min_group = 1  # type: ignore[attr-defined]
dagger.cost = "a turn of the teacher in every state"  # type: ignore[attr-defined]


def beta(i: int, decay: float) -> float:
    """Probability that the teacher acts, in step i from 0."""
    return decay**i


@plays_episodes
async def labelled_groups(
    prompts: Sequence[Prompt], io: RolloutIO, *, decay: float, student_turns: float | None, teacher: Teacher | None, replay: float
) -> list[Group]:  # fmt: skip
    """Episodes of the mixture, and behind them in each group the labels of their states."""
    if io.environment is None:
        raise InputError("[rule] dagger plays episodes; give the recipe a section [environment] (docs/agents.md)")
    i = max(0, io.step - 1)  # a look at the recipe is step 0
    labels: dict[tuple[str, int], list[tuple[list[int], str]]] = {}

    async def before(e: Episode) -> str | None:
        text = await (e.expert() if teacher is None else e.host.call("the teacher", partial(teacher, e.prompt, list(e.messages))))
        labels.setdefault((e.prompt.visit_id, e.i), []).append((e.ids, text))
        if student_turns is not None:
            return text if e.turn >= int(student_turns * i) else None
        return text if io.rng("dagger", e.prompt.visit_id, e.i, e.turn).random() < beta(i, decay) else None

    groups = await io.environment.play(prompts, io, before=before)
    old = _kept(io) if replay else []
    for g in groups:
        for k, s in enumerate(list(g.samples)):
            s.weights = {"policy": 0.0}
            states = labels.get((g.prompt.visit_id, k), [])
            g.samples += [_label(g.prompt, f"{s.id}/label{t}", ids, text, io) for t, (ids, text) in enumerate(states)]
            said = s.token_ids
            for ids, text in states:
                own = io.chat.completion_ids(text)
                at = len(ids) - len(s.context_ids)
                io.note("agreed", float(said[at : at + len(own)] == own))
        fresh = [s for s in g.samples if s.role == "label"]
        io.note("labels", len(fresh), 0)
        if replay:
            g.samples += [_replayed(g.prompt, j, old, io) for j in range(round(replay * len(fresh))) if old]
            for s in fresh:
                io.memory.remember("dagger", "", [s.context_ids, s.token_ids, i, s.id], cap=KEPT)
    io.note("beta", beta(i, decay))
    return groups


labelled_groups.needs_environment = True  # type: ignore[attr-defined]


def _kept(io: RolloutIO) -> list[Any]:
    """Labels of earlier steps in an order that ranks do not change; of a step that has begun to drop out of the memory none."""
    old = sorted(io.memory.recall("dagger", ""), key=lambda entry: (entry[2], entry[3]))
    return [entry for entry in old if entry[2] > old[0][2]] if len(old) == KEPT else old


def _label(prompt: Prompt, name: str, ids: list[int], text: str, io: RolloutIO) -> Sample:
    return _sample(prompt, name, ids, io.chat.completion_ids(text), io.version, max(0, io.step - 1), text)


def _replayed(prompt: Prompt, j: int, old: Sequence[Any], io: RolloutIO) -> Sample:
    context, token_ids, step, _ = old[int(io.rng("dagger", "replay", prompt.visit_id, j).integers(len(old)))]
    return _sample(prompt, f"{prompt.visit_id}/replayed{j}", context, token_ids, io.version, step, io.chat.text(token_ids))


def _sample(prompt: Prompt, name: str, context: list[int], token_ids: list[int], version: int, step: int, text: str) -> Sample:
    return Sample(
        id=name, prompt_id=prompt.id, context_ids=context, token_ids=token_ids, behavior_logp=None, policy_version=version, text=text, role="label",
        cohort=f"{prompt.visit_id}/labels", weights={"label": 1.0}, streams={"round": [float(step)] * len(token_ids)},
    )  # fmt: skip
