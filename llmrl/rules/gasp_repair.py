"""GASP's in-distribution repair guidance: repairs that the model makes itself, with a hint, and learns to make without it. See gasp.py.

Harvest right continuations; where they are scarce sample repairs with a hint; keep those that are right, silent about the hint and likely
enough without it; one a context. Trained behind the corrupted context: nothing of the hint is in what the learner sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from llmrl.records import Sample
from llmrl.rollout import RolloutIO
from llmrl.rules.gasp_game import Corruption, Game, Item, complete, gate, mean_nll, own_logps, record, wanted_tokens
from llmrl.rules.gasp_parts import leaks


def guidance_weight(recovery: float | None, *, off: float) -> float:
    """1 - rec, rec the running mean reward of the agent on corrupted contexts (None = 0); 0 once it is above `off`."""
    rec = recovery or 0.0
    return 0.0 if rec > off else 1.0 - rec


async def repair(items: Sequence[Item], io: RolloutIO, game: Game, warming: bool) -> None:
    """At most one repair a corrupted context: right, silent about the hint, and likely enough under the context without the hint."""
    live = [(item, x) for item in items for x in item.corruptions if x.agents]
    rows = iter(own_logps([s for _, x in live for s in x.agents], io))
    for _, x in live:
        x.nlls = [mean_nll(next(rows)) for _ in x.agents]
    limit = gate(io, "gasp/continuation_nll", [v for _, x in live for v in x.nlls], game.nll_quantile)
    weight = guidance_weight(io.memory.average("gasp/recovery"), off=game.anneal_off)
    if limit is None or warming or not game.guidance:
        return
    io.note("repair_gate", limit)
    io.note("guidance", game.guidance * weight)
    if not weight:
        return
    hinted = await _hinted(live, io, game)
    for item, x in live:
        harvest = [(nll, "harvest", s) for nll, s in zip(x.nlls, x.agents, strict=True) if s.reward == 1.0 and s.finish == "stop"]
        found = [(nll, k, source, s) for k, (nll, source, s) in enumerate([*harvest, *hinted.get((item.name, x.m), [])]) if not leaks(s.text, game.leaks)]
        accepted = [row for row in found if row[0] <= limit]
        if not accepted:
            continue
        nll, _, source, s = min(accepted)[:4]
        io.note("repair_nll", nll)
        for name in ("harvest", "hinted"):
            io.note(f"repairs_{name}", float(source == name), 0)
        name = f"{item.name}/repair/{x.m}"
        parent = s.id if source == "harvest" else s.parent
        item.repairs.append(replace(s, id=name, cohort=name, role="repair", reward=None, weights={"repair": weight}, parent=parent).recontext(x.context))


async def _hinted(live: Sequence[tuple[Item, Corruption]], io: RolloutIO, game: Game) -> dict[tuple[str, int], list[tuple[float, str, Sample]]]:
    """Right repairs of the contexts where recovery is scarce, sampled with the hint, each with its NLL under the context without it."""
    how = replace(io.sampling, max_new_tokens=wanted_tokens(io, game))
    jobs: list[tuple[Item, Corruption, list[int], int]] = []
    for item, x in live:
        if x.recovery is None or x.recovery > game.scarce:
            continue
        text = {"prefix": item.prefix, "corrupted": x.ids, "step": item.step}
        shown = game.repair_prompt.messages(item.prompt, answer=item.prompt.answer or "", **{k: io.chat.text(ids) for k, ids in text.items()})
        jobs += [(item, x, io.chat.prompt_ids(shown), r) for r in range(game.repairs)]
    done = complete([context for *_, context, _ in jobs], [(item.name, "repair", x.m, r) for item, x, _, r in jobs], how, io)
    made = [(item, x, asked, r, completion) for (item, x, asked, r), completion in zip(jobs, done, strict=True) if completion]
    verdicts = await io.verify([(item.prompt, completion.text) for item, *_, completion in made])
    io.note("repairs_asked", len(made), 0)
    right = []
    for (item, x, asked, r, completion), verdict in zip(made, verdicts, strict=True):
        if verdict.score is not None:
            io.note("hinted_right", float(verdict.score == 1.0))
        if verdict.score == 1.0 and completion.finish == "stop":
            parent = x.sample.id if x.sample else item.trace.id
            right.append((item, x, record(item, completion, asked, "repair", f"hinted/{x.m}/{r}", parent, verdict)))
    found: dict[tuple[str, int], list[tuple[float, str, Sample]]] = {}
    for (item, x, s), logps in zip(right, io.score([x.context for _, x, _ in right], [s.token_ids for *_, s in right]), strict=True):
        io.note("hinted_nll", mean_nll(logps))
        found.setdefault((item.name, x.m), []).append((mean_nll(logps), "hinted", s))
    return found
