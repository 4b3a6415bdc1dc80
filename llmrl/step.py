"""One training step: collect, credit, pack, forward, backward, update. Knows nothing of any paper."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from llmrl.batch import evaluate_terms, global_denominators, numbers, pack, token_metrics
from llmrl.credit import State, View
from llmrl.learner import Learner, RunFailed, learning_rate
from llmrl.records import Group, Prompt, Sample
from llmrl.rollout import RolloutIO, philox, timed
from llmrl.rules.base import Needs, Rule
from llmrl.session import Session

Row = dict[str, float | None]


def view_of(samples: Sequence[Sample], learner: Learner, max_new_tokens: int) -> View:
    """This rank's samples as credit sees them."""
    lengths = [s.length for s in samples]
    names = {n for s in samples for n in s.streams}

    def along(values: Sequence[Sequence[float] | None]) -> list[float]:
        return [x for s, v in zip(samples, values, strict=True) for x in (s.counted(v) if v else [float("nan")] * s.length)]

    streams = {n: along([s.streams.get(n) for s in samples]) for n in names}
    streams["behavior_logp"] = along([s.behavior_logp for s in samples])
    return View(
        reward_S=torch.tensor([0.0 if s.reward is None else s.reward for s in samples], dtype=torch.float64),
        scored_S=torch.tensor([s.reward is not None for s in samples]),
        cohort_S=torch.tensor(numbers(s.cohort for s in samples)),
        length_S=torch.tensor(lengths),
        truncated_S=torch.tensor([s.finish == "length" for s in samples]),
        sample_T=torch.repeat_interleave(torch.arange(len(samples)), torch.tensor(lengths)),
        max_new_tokens=max_new_tokens,
        streams={n: torch.tensor(v, dtype=torch.float64) for n, v in streams.items()},
        all_sum=learner.all_sum, gather=learner.gather,
    )


def rollouts(session: Session, step: int, turn: Callable[[], object] | None = None) -> Callable[[], tuple[list[Group], RolloutIO]]:
    """Takes the prompts of a step; what it returns makes their groups, and tells what was used for them.

    Touches the engine, the verifier, the memory and the prompts, not the learner. turn: for rollouts that run ahead (ahead.py), waits until
    more prompts may be taken.
    """
    r, stream = session.recipe, session.stream

    def more(n: int) -> list[Prompt]:
        if turn is not None:
            turn()
        return stream.take(n)

    mine = r.rollout.prompts // session.world
    everyone = stream.coming(mine * session.world)
    prompts = stream.take(mine)
    io = RolloutIO(
        session.engine, session.scorer, session.policy.chat, session.memory.branch() if turn else session.memory, session.sampling, r.rollout.group,
        (r.seed, step), steps=r.steps, more_prompts=more, step_prompts=everyone, environment=session.environment,
    )  # fmt: skip
    return lambda: (asyncio.run(session.rule.collect(prompts, io)), io)  # type: ignore[arg-type]


def run_step(session: Session, step: int, *, ahead: int = 0) -> tuple[list[Group], list[Tensor], Row]:
    """Step `step` (from 1): its groups, their advantages (one [Sample.length] tensor a sample, in order), and a row of metrics.

    ahead: the rollouts of so many steps after this one are under way when it ends, see ahead.py.
    """
    r, learner, rule = session.recipe, session.learner, session.rule
    began, cpu, scored = time.perf_counter(), time.process_time(), session.scorer.stats()
    coming = session.ahead.take(step)
    groups, io = coming or rollouts(session, step)()
    seconds = io.seconds
    if hasattr(session.engine, "sleep"):
        session.engine.sleep()  # servers on this GPU give their memory back while the learner learns
    session.memory.join(io.memory)
    session.memory.end_step(learner.gather)
    samples = [s for g in groups for s in g.samples]
    stale = drop_stale(samples, learner.version, r.engine.max_staleness * r.batch.minibatches * r.batch.epochs if coming else 0)
    session.ahead.begin(step, ahead, lambda n, turn: rollouts(session, n, turn))
    with timed(seconds, "update"):
        for name in _streams_before_credit(rule.needs, updates=r.batch.minibatches * r.batch.epochs):
            learner.add_stream(name, samples, tokens=r.batch.tokens)
        if rule.needs.hidden:
            learner.add_hidden_streams(rule.needs.hidden, samples, tokens=r.batch.tokens)
        adv, session.credit_state = give_credit(rule, samples, view_of(samples, learner, session.most_tokens), session.credit_state)
        learned = learn(session, groups, samples, adv, step)
    with timed(seconds, "wait"):
        if r.engine.max_staleness == 1:  # all of it is in before the weights change under it
            session.ahead.settle()
    with timed(seconds, "publish"):
        published = publish(session)
    row = {**rollout_metrics(samples, adv, learner), **rule_metrics(io, learner), **learned, **published}
    row |= {f"time/{name}_s": t for name, t in seconds.items()} | stale
    row |= {"time/step_s": time.perf_counter() - began, "time/cpu_s": time.process_time() - cpu}
    row |= verifier_metrics(scored, session.scorer.stats())
    return groups, adv, row


def give_credit(rule: Rule, samples: Sequence[Sample], view: View, state: dict[str, State]) -> tuple[list[Tensor], dict[str, State]]:
    """-> (advantages, one [Sample.length] tensor a sample; new state). The credit's channels become streams of the samples."""
    lengths = [s.length for s in samples]
    adv_T, state = rule.credit.update(view, state)
    channels, state = rule.credit.extra(view, state)
    for name, x_T in channels.items():
        for s, x in zip(samples, x_T.split(lengths), strict=True):
            s.streams[name] = s.spread(x.tolist())
    return list(adv_T.split(lengths)), state


def drop_stale(samples: Sequence[Sample], version: int, allowed: int) -> Row:
    """Samples of weights more than `allowed` updates old train nothing; where none may be old, one that is stops the run.

    A sample without behavior_logp is text that a rule trains on, of whatever origin: no correction for its age is meant.
    """
    samples = [s for s in samples if s.behavior_logp is not None]
    behind = [version - s.policy_version for s in samples]
    for s, n in zip(samples, behind, strict=True):
        if n < 0 or (n > 0 and not allowed):
            raise RunFailed(f"sample {s.id} is of policy version {s.policy_version}, the learner is at {version}: stale rollouts")
        if n > allowed:
            s.reward, s.weights = None, dict.fromkeys(s.weights, 0.0)
    return {"samples/staleness_updates": sum(behind) / max(1, len(behind)), "samples/stale": float(sum(n > allowed for n in behind))}


PROBE_TOKENS = 64


def publish(session: Session) -> Row:
    """Hands the learner's weights to the engine, and proves that they arrived: every server's log-probs of a fixed text are the learner's."""
    learner, engine = session.learner, session.engine
    engine.load_weights(learner.version, learner.weights)
    if not hasattr(engine, "fingerprint"):
        return {}
    chat, prompt = session.policy.chat, session.tables.train[0]
    ids = (chat.prompt_ids(prompt.messages) + chat.completion_ids(prompt.answer or "1"))[:PROBE_TOKENS]
    mine, worst = learner.probe(ids), 0.0
    bf16 = session.recipe.model.dtype == "bfloat16"  # SmolLM2 on a right server: mean 0.04, on a single unlikely token up to 0.8 nats
    limit, mean_limit = session.recipe.checks.max_fingerprint_gap or (2.0 if bf16 else 1e-3), 0.15 if bf16 else 1e-3
    for server, theirs in engine.fingerprint(ids, (limit, max(mean_limit, limit / 10))).items():
        gaps = [abs(a - b) for a, b in zip(mine, theirs, strict=True)]
        gap, place = max((g, k) for k, g in enumerate(gaps))
        worst = max(worst, gap)
        if not (gap <= limit and sum(gaps) / len(gaps) <= max(mean_limit, limit / 10)):
            raise RunFailed(
                f"after update {learner.version} {server} does not hold the learner's weights: on a fixed text its log-prob of token {place + 2} of "
                f"{len(ids)} is {theirs[place]:.6g}, the learner's {mine[place]:.6g} (limit {limit:g} nats, checks.max_fingerprint_gap; "
                f"mean of all {sum(gaps) / len(gaps):.3g})"
            )
    return {"logp_gap/fingerprint_nats": worst}


def _streams_before_credit(needs: Needs, *, updates: int) -> list[str]:
    """old_logp costs a forward only where the rule wants it before credit, or where weights move within the step."""
    wanted = {"old_logp": needs.old_logp or updates > 1, "ref_logp": needs.ref_logp, "old_entropy": needs.old_entropy}
    return [name for name in wanted if wanted[name]]


def needs_forward(rule: Rule, sample: Sample, adv: Tensor) -> bool:
    """False when no term can have a gradient on this sample: no weight, or advantage 0 under losses that scale with it."""
    for term in rule.loss:
        if sample.weights.get(term.weight, 0.0) > 0 and term.coef != 0 and (not getattr(term.fn, "scales_with_advantage", False) or bool(adv.any())):
            return True
    return False


def minibatches(groups: Sequence[Group], n: int, key: tuple[int | str, ...]) -> list[list[int]]:
    """Numbers of the groups in each of n nearly equal parts, shuffled by `key` when there is more than one part."""
    order = list(range(len(groups)))
    if n > 1:
        order = philox(key).permutation(len(groups)).tolist()
    bounds = [round(i * len(order) / n) for i in range(n + 1)]
    return [sorted(order[a:b]) for a, b in pairwise(bounds)]


def learn(session: Session, groups: Sequence[Group], samples: Sequence[Sample], adv: Sequence[Tensor], step: int) -> Row:
    """All updates of a step; returns metrics of the loss, meaned over tokens of all ranks and updates."""
    r, learner, rule = session.recipe, session.learner, session.rule
    places, at = [], 0
    for g in groups:
        places.append(range(at, at + len(g.samples)))
        at += len(g.samples)
    group_of = [k for k, place in enumerate(places) for _ in place]
    sums: Counter[str] = Counter()
    gap_max, norms = 0.0, []
    lr = learning_rate(r.optim, step - 1, r.steps)
    first = True
    for epoch in range(r.batch.epochs):
        for part in minibatches(groups, r.batch.minibatches, (r.seed, step, "minibatch", epoch, session.rank)):
            mine = [i for k in part for i in places[k]]
            denominators = global_denominators(
                [samples[i] for i in mine], rule.loss, max_new_tokens=session.most_tokens, groups=len(part), all_sum=learner.all_sum
            )
            live = mine if rule.needs.whole_groups else [i for i in mine if needs_forward(rule, samples[i], adv[i])]
            batches = pack(
                [samples[i] for i in live], [adv[i] for i in live], tokens=r.batch.tokens,
                groups=[group_of[i] for i in live], whole_groups=rule.needs.whole_groups,
            )  # fmt: skip
            for batch, last in learner.in_step(batches):
                out = learner.forward(batch, rule.needs)
                loss, shares = evaluate_terms(rule.loss, batch, out, denominators)
                learner.backward(loss, last)
                metrics = token_metrics(batch, out, rule.loss)
                metrics["trained"] = float(len(batch.ids_P))
                if first:
                    # those of older weights differ by right, and the rule corrects for it
                    if all(s.policy_version == learner.version for s in samples if s.behavior_logp is not None):
                        check_gap(session, metrics, step)
                    gap_max = metrics.get("gap_max", 0.0)
                first = False
                sums.update({k: v for k, v in metrics.items() if k not in ("gap_max", "over_max")})  # type: ignore[arg-type]
                sums.update({f"loss/{k}": v for k, v in shares.items()})  # type: ignore[arg-type]
            norms.append(learner.update(lr))
    return _loss_row(learner, rule, sums, gap_max, norms, lr)


def _loss_row(learner: Learner, rule: Rule, sums: Counter[str], gap_max: float, norms: list[float], lr: float) -> Row:
    names = ["n", "n_gap", "gap", "kl_old", "kl_ref", "entropy", "clipped", "trained", *(f"loss/{t.label}" for t in rule.loss)]
    names = list(dict.fromkeys(names))
    total = dict(zip(names, learner.all_sum(torch.tensor([float(sums[k]) for k in names], dtype=torch.float64)).tolist(), strict=True))
    worst = float(learner.all_max(torch.tensor([gap_max], dtype=torch.float64))[0])

    def mean(key: str, n: str = "n", on: bool = True) -> float | None:
        return total[key] / total[n] if on and total[n] else None

    row: Row = {f"loss/{t.label}": total[f"loss/{t.label}"] / len(norms) for t in rule.loss}
    row |= {
        "logp_gap/max_nats": worst if total["n_gap"] else None, "logp_gap/mean_nats": mean("gap", "n_gap"), "kl/old_nats": mean("kl_old"),
        "kl/ref_nats": mean("kl_ref", on=rule.needs.ref_logp), "entropy/policy_nats": mean("entropy", on=rule.needs.entropy),
        "clip/share": mean("clipped", on=any(hasattr(t.fn, "clip_bounds") for t in rule.loss)),
        "grad/norm": sum(norms) / len(norms), "lr": lr, "tokens/trained": total["trained"], "policy_version": learner.version,
    }  # fmt: skip
    return row


def gap_limit(session: Session) -> float:
    """Largest |logp - behavior_logp| (nats) that is no alarm: checks.max_logp_gap, by default 1e-3 in float32 and 2 in bfloat16.

    In bf16 batches of other shapes round differently, which is worth up to 0.6 nats on unlikely tokens (SmolLM2, measured); a wrong
    context or a padding token that was sampled shows as 4 and more.
    """
    return session.recipe.checks.max_logp_gap or (2.0 if session.recipe.model.dtype == "bfloat16" else 1e-3)


def check_gap(session: Session, metrics: dict[str, float], step: int) -> None:
    """The alarm: on the first micro-batch the learner must agree with the engine, or one of them sees another context or other weights.

    Where top-p, top-k or min-p cut the distribution that the engine samples from, its log-probs are the larger ones: one-sided then.
    """
    s, limit = session.sampling, gap_limit(session)
    gap = metrics.get("over_max" if s.top_p < 1 or s.top_k or s.min_p else "gap_max", 0.0)
    if not gap <= limit:  # a NaN is an alarm too
        raise RunFailed(
            f"step {step}: learner and engine disagree by {gap:.4g} nats on a sampled token (limit {limit:g}, checks.max_logp_gap): the engine has "
            "other weights, another temperature, or tokens are trained under another context than they were sampled in"
        )


def verifier_metrics(before: dict[str, float], after: dict[str, float]) -> Row:
    """What this rank's verifier processes did between two looks at Scorer.stats()."""
    new = {name: value - before.get(name, 0) for name, value in after.items()}
    verdicts = sum(new.pop(status) for status in ("ok", "no_answer", "timeout", "error"))
    times = {f"time/verdict_{part}_s": new.pop(f"{part}_s") / verdicts if verdicts else None for part in ("queue", "run")}
    return {**times, **{f"verifier/{name}": value for name, value in new.items()}}


def rule_metrics(io: RolloutIO, learner: Learner) -> Row:
    """What the rule noted, and the tokens that it had generated: means and sums over all ranks."""
    total: dict[str, list[float]] = {}
    for noted, tokens in learner.gather((io.noted, io.generated)):
        for name, (value, n) in {**noted, "tokens/generated": (float(tokens), 0.0)}.items():
            there = total.setdefault(name, [0.0, 0.0])
            there[0], there[1] = there[0] + value, there[1] + n
    return {name: total[name][0] / n if (n := total[name][1]) else total[name][0] for name in sorted(total)}


def rollout_metrics(samples: Sequence[Sample], adv: Sequence[Tensor], learner: Learner) -> Row:
    """Metrics of the policy's samples, over all ranks."""
    policy = [(s, a) for s, a in zip(samples, adv, strict=True) if s.role == "policy"]
    sums: Counter[str] = Counter()
    cohorts: dict[str, bool] = {}
    for s, a in policy:
        cohorts[s.cohort] = cohorts.get(s.cohort, False) or bool(a.any())
        sums["n"] += 1
        sums["tokens"] += s.length
        sums["cut"] += s.finish == "length"
        sums[s.verdict.status if s.verdict else "error"] += 1
        if s.behavior_logp is not None:
            sums["nll"] -= sum(s.counted(s.behavior_logp))  # type: ignore[assignment]
            sums["nll_n"] += s.length
        if s.reward is not None:
            sums["scored"] += 1
            sums["reward"] += s.reward  # type: ignore[assignment]
            sums["square"] += s.reward**2  # type: ignore[assignment]
    sums["cohorts"], sums["live"] = len(cohorts), sum(cohorts.values())
    keys = ["n", "tokens", "cut", "ok", "no_answer", "timeout", "error", "nll", "nll_n", "scored", "reward", "square", "cohorts", "live"]
    t = dict(zip(keys, learner.all_sum(torch.tensor([float(sums[k]) for k in keys], dtype=torch.float64)).tolist(), strict=True))
    longest = float(learner.all_max(torch.tensor([max((s.length for s, _ in policy), default=0)], dtype=torch.float64))[0])
    mean = t["reward"] / t["scored"] if t["scored"] else None
    return {
        "reward/mean": mean, "reward/std": None if mean is None else max(0.0, t["square"] / t["scored"] - mean**2) ** 0.5,
        "samples": t["n"], "samples/unjudged": t["timeout"] + t["error"],
        "samples/timeout": t["timeout"], "samples/error": t["error"], "samples/no_answer_share": t["no_answer"] / t["n"] if t["n"] else None,
        "groups/live_share": t["live"] / t["cohorts"] if t["cohorts"] else None, "length/mean_tokens": t["tokens"] / t["n"] if t["n"] else None,
        "length/max_tokens": longest, "length/truncated_share": t["cut"] / t["n"] if t["n"] else None,
        "entropy/rollout_nats": t["nll"] / t["nll_n"] if t["nll_n"] else None,
    }  # fmt: skip
