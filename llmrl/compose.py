"""Composition in a recipe: the keys of [rule] that every rule has beside its own. They put another credit on it, further loss terms, and the
correction of rollouts that are not quite from the weights that learn.

    [rule]
    use = "dapo"
    credit = ["canon", "clip_adv"]                    # in place of dapo's: the credit of rule canon, then a transform of llmrl/credit.py
    loss = [{ use = "entropy_bonus", coef = 0.01 }]   # beside dapo's terms
    mismatch = "token_truncate"

What contradicts itself is refused, before any model is loaded: two credits, a credit that the loss does not read, a second policy loss, ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmrl import losses, plugins
from llmrl.credit import Credit, Transform
from llmrl.recipe import Mismatch, Plugin, RulePlugin, TermPlugin
from llmrl.records import InputError
from llmrl.rollout import dynamic_groups, sample_groups
from llmrl.rules.base import Needs, Rule, Term

RULES, CREDIT, LOSSES = "llmrl.rules", "llmrl.credit", "llmrl.losses"
"""Where bare names are looked up: those of `credit` among the transforms first, then among the rules."""


def build_rule(spec: RulePlugin, base: Path) -> Rule:
    """The rule that a [rule] section describes. Raises InputError naming the key."""
    rule = plugins.use(spec.use, spec.kwargs, home=RULES, base=base, where="[rule]")
    if not isinstance(rule, Rule):
        raise InputError(f'[rule] use = "{spec.use}": the factory returned {type(rule).__name__}, not a llmrl.rules.base.Rule')
    if spec.credit is not None:
        rule = with_credit(rule, spec.use, spec.credit, base)
    for k, term in enumerate(spec.loss):
        rule = with_term(rule, spec.use, term, base, f"[rule] loss[{k}]")
    if spec.mismatch is None and spec.mismatch_max is not None:
        raise InputError("[rule] mismatch_max: does nothing without `mismatch`; set that too, or leave it out")
    return rule if spec.mismatch is None else with_mismatch(rule, spec.mismatch, spec.mismatch_max or 2.0, name=spec.use)


def parts(spec: RulePlugin) -> list[tuple[str, Plugin, str]]:
    """(key below [rule], plug-in, home of its bare name) of everything that a composed rule plugs in beside `use`."""
    found = [(f"credit[{k}]", p, home_of(p.use)) for k, p in enumerate(spec.credit or ())]
    return found + [(f"loss[{k}]", p, LOSSES) for k, p in enumerate(spec.loss)]


def home_of(ref: str) -> str:
    """Of an entry of `credit`: a transform or a rule. InputError for a bare name that is neither."""
    transforms, rules = plugins.available(CREDIT), plugins.available(RULES)
    if ref.isidentifier() and ref not in transforms and ref not in rules:
        close = plugins.nearest(ref, [*transforms, *rules])
        hint = f'nearest: "{close}"; ' if close else ""
        raise InputError(f'[rule] credit: no transform or rule "{ref}"; {hint}transforms: {", ".join(sorted(transforms))}; rules: {", ".join(sorted(rules))}')
    return CREDIT if ref in transforms else RULES


# ---------------------------------------------------------------- credit


def with_credit(rule: Rule, name: str, entries: Sequence[Plugin], base: Path) -> Rule:
    """`rule` with the credit that the entries make in their order: of transforms, and of one rule at most, whose credit alone is taken."""
    where = "[rule] credit"
    if not any(getattr(t.fn, "scales_with_advantage", False) for t in rule.loss):
        raise InputError(f"{where}: no term of {name}'s loss is scaled by the advantage, so another credit would do nothing; leave `credit` out")
    if rule.credit.channels:
        raise InputError(f"{where}: {name}'s loss reads the channel {_names(rule.credit.channels)} of its own credit; it takes no other")
    if not (_is(rule, sample_groups) or _is(rule, dynamic_groups)):
        raise InputError(f"{where}: {name} makes rollouts of its own for its own credit; it takes no other")
    if rule.needs.ref_logp and not any("ref_logp" in getattr(t.fn, "asks", ()) for t in rule.loss):
        raise InputError(f"{where}: {name} takes its KL penalty off the reward, and another credit would lose it; set rule.kl = 0, and a KL term under `loss`")
    sample: list[Transform] = []
    token: list[Transform] = []
    needs, collect, source = rule.needs, rule.collect, ""
    for k, entry in enumerate(entries):
        at = f"{where}[{k}]"
        found = plugins.use(entry.use, entry.kwargs, home=home_of(entry.use), base=base, where=at)
        if isinstance(found, Rule):
            if source:
                raise InputError(f"{at}: {source} and {entry.use} each make the advantage; name one of them")
            source = entry.use
            _may_lend(found, source, at)
            if not _is(found, sample_groups):
                if rule.collect is not sample_groups and getattr(rule.collect, "keywords", {}) != {"mask_truncated": False}:
                    raise InputError(f"{at}: {source}'s credit reads what its own rollouts bring, and {name} as it is set has its own way of sampling too; "
                                     f"switch that off (dapo: rule.dynamic_rounds = 0, rule.mask_truncated = false)")  # fmt: skip
                collect = found.collect
            needs = _joined(needs, found.needs)
            found = found.credit
        chain = found if isinstance(found, Credit) else Credit((found,)) if isinstance(found, Transform) and found.per == "sample" else found
        chain = Credit((), (chain,)) if isinstance(chain, Transform) else chain
        if not isinstance(chain, Credit):
            raise InputError(f"{at}: {entry.use} returned {type(found).__name__}, not a Transform or Credit of llmrl.credit, nor a Rule")
        if token and chain.sample:
            raise InputError(f"{at}: {entry.use} works on samples and stands behind {token[-1].name}, which works on tokens; put it before that")
        sample += chain.sample
        token += chain.token
    streams = {s for t in (*sample, *token) for s in t.streams}
    try:
        credit = Credit(tuple(sample), tuple(token))
    except ValueError as exc:
        raise InputError(f"{where}: {exc}") from exc
    return replace(rule, credit=credit, collect=collect, needs=replace(needs, **dict.fromkeys(streams, True)))


def _may_lend(rule: Rule, name: str, at: str) -> None:
    """Can this rule's credit stand without its loss?"""
    others = {t.weight for t in rule.loss} - {"policy"}
    if others:
        raise InputError(f"{at}: {name} trains the weight {_names(others)} with a loss of its own; its credit alone would leave those samples unused")
    if rule.credit.channels:
        raise InputError(f"{at}: {name}'s credit feeds its own loss by the channel {_names(rule.credit.channels)}; use it as rule.use")
    if not any(getattr(t.fn, "scales_with_advantage", False) for t in rule.loss):
        raise InputError(f"{at}: {name}'s credit is no advantage, it belongs to its own loss; use it as rule.use")


def _joined(needs: Needs, other: Needs) -> Needs:
    """`needs` and what another rule's credit reads: the streams that are known before it."""
    streams = {k: getattr(needs, k) or getattr(other, k) for k in ("ref_logp", "old_logp", "old_entropy")}
    return replace(needs, **streams, hidden={**needs.hidden, **other.hidden})


def _is(rule: Rule, collect: Any) -> bool:
    return getattr(rule.collect, "func", rule.collect) is collect


def _names(names: Any) -> str:
    return ", ".join(f'"{n}"' for n in sorted(names))


# ---------------------------------------------------------------- loss


def with_term(rule: Rule, name: str, spec: TermPlugin, base: Path, where: str) -> Rule:
    """`rule` with one more term, reduced as its first one unless `over` says otherwise."""
    made = plugins.use(spec.use, spec.kwargs, home=LOSSES, base=base, where=where)
    if not callable(made):
        raise InputError(f"{where}: {spec.use} returned {type(made).__name__}; a loss factory returns a function (batch, out) -> l_T")
    fn: Any = made
    label = getattr(fn, "__name__", spec.use)
    if getattr(fn, "scales_with_advantage", False):
        raise InputError(f"{where}: {label} is a policy loss, and {name} has its own; choose it by rule.use")
    if getattr(fn, "monitors", False):
        raise InputError(f"{where}: the gradient of {label} is zero in expectation, so as a term it would do nothing; use kl_k2 or kl_k3")
    there = [t.label for t in rule.loss] + [t.name for t in rule.credit.sample + rule.credit.token]
    twins = [t for t in there if t == label or (t.startswith("kl_") and label.startswith("kl_"))]
    if twins:
        raise InputError(f"{where}: {name} as it is set has {twins[0]} already; keep one of the two")
    first = rule.loss[0]
    term = Term(fn, weight=spec.weight, over=spec.over or first.over, coef=spec.coef, budget=first.budget if spec.over in (None, first.over) else None)
    needs = replace(rule.needs, **dict.fromkeys(getattr(fn, "asks", ()), True))
    return replace(rule, loss=(*rule.loss, term), needs=needs)


def with_mismatch(rule: Rule, how: Mismatch, ratio_max: float = 2.0, *, name: str = "the rule") -> Rule:
    """`rule` with its policy losses weighed by rho = exp(old_logp - behavior_logp), see losses.mismatch: one weight a token or a sequence, cut off
    at ratio_max or masked beyond it (2.0 for token_truncate and 3.0 for sequence_mask are OUR CHOICE)."""

    def is_policy(t: Term) -> bool:
        return getattr(t.fn, "scales_with_advantage", False) or hasattr(t.fn, "scales_with_channel")

    if not any(is_policy(t) for t in rule.loss):
        raise InputError(f"[rule] mismatch: no term of {name}'s loss is a policy loss, so there is nothing to correct; leave it out")
    if any(getattr(t.fn, "corrects_mismatch", False) for t in rule.loss):
        raise InputError(f"[rule] mismatch: {name} corrects the mismatch itself; leave it out")
    per, cut = how.split("_")
    terms = [
        replace(t, fn=losses.mismatch(t.fn, cut, ratio_max=ratio_max, over="token" if per == "token" else "sample")) if is_policy(t) else t  # type: ignore[arg-type]
        for t in rule.loss
    ]  # fmt: skip
    return replace(rule, loss=tuple(terms))
