"""GASP-style, reconstructed from the abstract: one model plays a polluter, who spoils a step of a solution, and an agent, who must recover.

After "Learning Robust Reasoning through Guided Adversarial Self-Play", arXiv:2602.00173. Of the paper the abstract, the first lines of
the introduction and two captions could be read, and no equation, prompt, setting or result. Tags: [P] = stated there: one model in two
roles, locally coherent corruptions meant to induce failure, the agent under the same corrupted context, outcome reward only, an imitation
term on repairs that the model made itself. [S] = a summary by others: GRPO is the optimiser. [I] = inferred. Everything else is OUR
CHOICE: the form of the polluter's reward, the unit of corruption, the gates, the prompts, the schedule and every constant. So this claims
no reproduction of the paper's numbers.

A step: (1) clean traces, plain GRPO groups; (2) one correct trace a problem is cut at a chunk, and the polluter writes M replacements of
that chunk; (3) the agent goes on from each valid one, G times, unwarned; (4) rewards; (5) repairs, for the imitation term. Numbers of
equations are those of our reconstruction.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from llmrl import credit as c
from llmrl import losses
from llmrl.records import Group, Prompt
from llmrl.rollout import RolloutIO, sample_groups
from llmrl.rules.base import Needs, Rule, Term
from llmrl.rules.gasp_game import Game, choose, pollute, recover, reward
from llmrl.rules.gasp_repair import repair
from llmrl.templates import read_template

GIVEAWAYS = ("incorrect", "mistake", "on purpose", "deliberate", "ignore", "erroneous", "flawed", "this is wrong")
LEAKS = (
    "original step", "original version", "the hint", "given answer", "as provided", "provided step", "provided answer", "known answer", "correct version",
    "sound version", "reference answer", "expected answer", "was given to me", "i was told", "these instructions",
)  # fmt: skip


def gasp(
    *, corruptions: int = 4, continuations: int | None = None, control: float = 0.25, clean_coef: float = 1.0, polluter_coef: float = 0.5,
    guidance: float = 0.04, repairs: int = 4, scarce: float = 0.25, anneal_decay: float = 0.95, anneal_off: float = 0.8, nll_quantile: float = 0.95,
    coherence_quantile: float = 0.99, coherence_slack: float = 1.0, chunk_min: int = 32, chunk_target: int = 64, chunk_max: int = 128,
    cut: str = "\n", answer_marks: tuple[str, ...] = ("\\boxed", "final answer", "####"), position: tuple[float, float] = (0.1, 0.7),
    delimiters: tuple[str, str] = ("<step>\n", "</step>"), replace_length: tuple[float, float] = (0.5, 2.0), replace_max: int = 160,
    min_edits: int = 3, giveaways: tuple[str, ...] = GIVEAWAYS, leaks: tuple[str, ...] = LEAKS, continuation_tokens: int | None = None,
    polluter: Literal["self", "rules"] = "self", warmup_steps: int = 0, guidance_only: bool = False, polluter_template: str = "chat",
    repair_template: str = "chat", low: float = 0.2, high: float = 0.2, std_eps: float = 1e-6, kl: float = 0.0, base: Path,
) -> Rule:  # fmt: skip
    """GASP-style, reconstructed from the abstract of arXiv:2602.00173: GRPO on clean, agent, control and polluter samples, and repairs.

    R^A = V(continuation) (1);  R^P_m = valid_m (1 - mean_j R^A_mj) (2);  A = (R - mean) / (std + std_eps) in each cohort (3), ddof 1
    loss = PG(agent) + clean_coef (PG(clean) + PG(control)) + polluter_coef PG(polluter) + guidance (1 - rec) CE(repair) + kl k3  (6)
    PG and CE are means over a sample's tokens, then over the samples of the role. Tags as at the top of the file; all constants OUR CHOICE.

    corruptions: M, 0 = plain grpo, bit for bit. continuations: G, None = rollout.group. control: share of the problems whose clean context
    is continued too. Cohorts: a prompt's clean samples, its corruptions, the continuations of one corruption, its controls.
    repairs: hinted ones a context whose recovery is at most `scarce`; at most one is kept, its NLL without the hint within the
    nll_quantile of the agent's own. rec: running mean recovery (anneal_decay); above anneal_off no repairs. guidance 0: none are made.
    chunk_*: tokens. cut: what ends a chunk. answer_marks: what begins a final answer. position: where a spoilt chunk may start, share of
    the trace. delimiters: the first is put behind the polluter's prompt, the second ends its reply. replace_length: times the
    original's; replace_max: tokens; min_edits: tokens. coherence: mean NLL within the quantile of original chunks + slack (nats).
    continuation_tokens: None = rollout.max_new_tokens. polluter "rules": edits of a number or sign, nothing of the polluter is trained.
    warmup_steps: first steps that train the polluter alone. guidance_only: no PG(agent). Templates: see llmrl.templates; fields
    {question} {prefix} {step}, and {question} {prefix} {corrupted} {step} {answer}.

    Metrics rule/*: skipped (prompts without a trace to spoil), valid, invalid_REASON, polluter_reward, recovery, control,
    groups_scarce / all_zero / all_one, corruption_nll, coherence_gate, repairs_asked, hinted_right, hinted_nll, repair_gate, repair_nll,
    repairs_harvest, repairs_hinted, guidance (annealed).
    Differs from the reconstruction's text: k3 is averaged as in grpo (sample, then samples), so that corruptions = 0 is grpo for every kl.
    """
    shares = {"control": control, "scarce": scarce, "anneal_decay": anneal_decay, "nll_quantile": nll_quantile, "coherence_quantile": coherence_quantile}
    _check(corruptions, continuations, repairs, (chunk_min, chunk_target, chunk_max), cut, position, delimiters, polluter, polluter_coef, shares)
    game = Game(
        corruptions=corruptions, continuations=continuations, control=control, polluter=polluter, guidance=guidance, repairs=repairs, scarce=scarce,
        anneal_decay=anneal_decay, anneal_off=anneal_off, nll_quantile=nll_quantile, coherence_quantile=coherence_quantile,
        coherence_slack=coherence_slack, chunk=(chunk_min, chunk_target, chunk_max), cut=cut, answer_marks=answer_marks, position=position,
        delimiters=delimiters, length=replace_length, replace_max=replace_max, min_edits=min_edits, giveaways=giveaways, leaks=leaks,
        continuation_tokens=continuation_tokens, warmup_steps=warmup_steps, kl=bool(kl),
        polluter_prompt=read_template(polluter_template, kind="gasp_polluter", fields=("prefix", "step"), base=base, needs=("question", "step")),
        repair_prompt=read_template(
            repair_template, kind="gasp_repair", fields=("prefix", "corrupted", "step", "answer"), base=base, needs=("question", "corrupted")
        ),
    )  # fmt: skip
    pg = losses.pg_clip(low, high)
    terms = [Term(pg, coef=clean_coef, over="sample", name="clean")]
    if corruptions:
        terms += [
            Term(pg, weight="agent", coef=0.0 if guidance_only else 1.0, over="sample", name="agent"),
            Term(pg, weight="control", coef=clean_coef, over="sample", name="control"),
            Term(pg, weight="polluter", coef=polluter_coef, over="sample", name="polluter"),
            Term(losses.ce(), weight="repair", coef=guidance, over="sample", count="samples", name="repair"),
        ]
    if kl:
        terms.append(Term(losses.kl_k3(), weight="kl" if corruptions else "policy", coef=kl, over="sample"))
    return Rule(credit=c.Credit((c.center(), c.scale(eps=std_eps))), loss=tuple(terms), collect=partial(play, game=game), needs=Needs(ref_logp=bool(kl)))


gasp.cost = "corruptions, their continuations and repairs: four to five times the tokens of grpo by default (4.6 in the small study)"  # type: ignore[attr-defined]


async def play(prompts: Sequence[Prompt], io: RolloutIO, *, game: Game) -> list[Group]:
    """All phases of a step. The clean samples come first in their groups and are those of plain GRPO, random streams included."""
    groups = await sample_groups(prompts, io)
    if not game.corruptions:
        return groups
    items = [item for g in groups if (item := choose(g, io, game)) is not None]
    io.note("skipped", len(groups) - len(items), len(groups))
    warming = io.step <= game.warmup_steps
    pollute(items, io, game)
    await recover(items, io, game)
    reward(items, io, game)
    await repair(items, io, game, warming)
    for item in items:
        polluters = [x.sample for x in item.corruptions if x.sample is not None]
        item.group.samples += [*polluters, *(s for x in item.corruptions for s in x.agents), *item.controls, *item.repairs]
    for s in (s for g in groups for s in g.samples):
        if warming and s.role != "polluter":
            s.weights = dict.fromkeys(s.weights, 0.0)
        elif game.kl and s.role != "repair":
            s.weights["kl"] = float(any(s.weights.values()))
    return groups


def _check(
    corruptions: int, continuations: int | None, repairs: int, chunk: tuple[int, int, int], cut: str, position: tuple[float, float],
    delimiters: tuple[str, str], polluter: str, polluter_coef: float, shares: dict[str, float],
) -> None:  # fmt: skip
    if corruptions < 0 or (continuations is not None and continuations < 1) or repairs < 0:
        raise ValueError(f"corruptions = {corruptions}, continuations = {continuations}, repairs = {repairs}: numbers of samples, from 0, 1 and 0 on")
    if corruptions == 1 and polluter == "self" and polluter_coef:
        raise ValueError("corruptions = 1: the polluter's samples are compared with each other; give 2 or more, or polluter_coef = 0")
    if not 0 < chunk[0] <= chunk[1] <= chunk[2]:
        raise ValueError(f"chunk_min, chunk_target, chunk_max = {chunk}: tokens, each at least as large as the one before")
    if not cut or not delimiters[1]:
        raise ValueError('cut and the second of delimiters must not be empty, e.g. cut = "\n", delimiters = ["<step>\\n", "</step>"]')
    if not 0 <= position[0] <= position[1] <= 1:
        raise ValueError(f"position = {position}: two shares of the trace, 0 <= first <= second <= 1")
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} = {value}: a share, from 0 to 1")
