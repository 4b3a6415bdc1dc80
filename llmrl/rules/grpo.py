"""The GRPO family: grpo, dr_grpo, dapo, gspo, cispo, rloo, reinforce_pp. Each is a composition; the differences are numbered.

Common keywords: `kl` is the coefficient of a KL penalty to the starting model (0 = no reference model is made) in the form `kl_form`:
"k2" and "k3" are terms of the loss, "k1" is taken off the reward, summed over the completion (in a loss it has no useful gradient);
`entropy` the coefficient of an entropy bonus; `mask_truncated`: completions cut by the length limit train nothing. `std_eps` is OUR CHOICE
(verl's; TRL 1e-4). The correction of the engine's mismatch (`mismatch`) is a key that every rule has: llmrl/compose.py.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

from llmrl import credit as c
from llmrl import losses
from llmrl.rollout import dynamic_groups, sample_groups
from llmrl.rules.base import Needs, Over, Rule, Term

KL = Literal["k1", "k2", "k3"]


_NOTHING = Needs()


def _rule(
    fn: losses.LossFn, sample: tuple[c.Transform, ...], over: Over, *, token: tuple[c.Transform, ...] = (), budget: int | None = None,
    kl: float = 0.0, kl_form: KL = "k3", entropy: float = 0.0, dynamic: int = 0, mask_truncated: bool = False, needs: Needs = _NOTHING,
) -> Rule:  # fmt: skip
    """The common skeleton: policy term, then KL and entropy terms where their coefficient is not 0, all reduced alike."""
    terms = [Term(fn, over=over, budget=budget)]
    if kl and kl_form == "k1":
        sample, needs = (c.kl_in_reward(coef=kl), *sample), Needs(ref_logp=True, old_logp=True)
    elif kl:
        terms.append(Term({"k2": losses.kl_k2, "k3": losses.kl_k3}[kl_form](), over=over, budget=budget, coef=kl))
    if entropy:
        terms.append(Term(losses.entropy_bonus(), over=over, budget=budget, coef=entropy))
    collect = partial(dynamic_groups, max_rounds=dynamic) if dynamic else sample_groups
    return Rule(
        credit=c.Credit(sample, token), loss=tuple(terms), collect=partial(collect, mask_truncated=mask_truncated),
        needs=Needs(ref_logp=bool(kl) or needs.ref_logp, old_logp=needs.old_logp, entropy=bool(entropy)),
    )  # fmt: skip


def grpo(
    *, low: float = 0.2, high: float = 0.2, scale: Literal["group", "batch"] = "group", std_eps: float = 1e-6, kl: float = 0.0,
    kl_form: KL = "k3", entropy: float = 0.0, mask_truncated: bool = False,
) -> Rule:  # fmt: skip
    """Group-relative advantages, per-token clipping, mean over each completion and then over completions. arXiv:2402.03300.

    A_i = (R_i - mean_group) / (std_group + std_eps), std with ddof 1;  loss = mean_i (1/|o_i|) sum_t clip(r_t, A_i) + kl * k3
    scale "batch" divides by the deviation of the whole batch instead (arXiv:2508.08221, as in TRL).
    Differs from the paper: the clip range is not published there (0.2 is OUR CHOICE, PPO's); kl defaults to 0 (paper: 0.04).
    """
    divide = c.scale(eps=std_eps) if scale == "group" else c.scale_batch(eps=std_eps)
    return _rule(
        losses.pg_clip(low, high), (c.center(), divide), "sample", kl=kl, kl_form=kl_form, entropy=entropy, mask_truncated=mask_truncated,
    )  # fmt: skip


def dr_grpo(
    *, low: float = 0.2, high: float = 0.2, budget: int | None = None, kl: float = 0.0, kl_form: KL = "k3", entropy: float = 0.0,
    mask_truncated: bool = False,
) -> Rule:  # fmt: skip
    """GRPO done right: (1) no division by the group's std, (2) a constant token budget instead of each completion's length.

    loss = sum_it clip(r_t, A_i) / (n_completions * budget). arXiv:2503.20783. budget None = rollout.max_new_tokens (paper: 3000).
    """
    return _rule(
        losses.pg_clip(low, high), (c.center(),), "fixed", budget=budget, kl=kl, kl_form=kl_form, entropy=entropy, mask_truncated=mask_truncated,
    )  # fmt: skip


def dapo(
    *, low: float = 0.2, high: float = 0.28, std_eps: float = 1e-6, dynamic_rounds: int = 10, overlong_cache: int = 0, overlong_penalty: float = 1.0,
    kl: float = 0.0, kl_form: KL = "k3", entropy: float = 0.0, mask_truncated: bool = False,
) -> Rule:  # fmt: skip
    """grpo with (1) a higher upper clip, (2) the mean over all tokens, (3) dynamic sampling with refill, (4) soft overlong punishment.

    arXiv:2503.14476; 0.2 / 0.28 are the paper's. dynamic_rounds 0 turns (3) off; overlong_cache (tokens; paper 4096 of 20480) turns (4)
    on. (3) judges the verifier's score, (4) changes the reward after it.
    """
    shaped = (c.overlong(cache=overlong_cache, penalty=overlong_penalty),) if overlong_cache else ()
    return _rule(
        losses.pg_clip(low, high), (*shaped, c.center(), c.scale(eps=std_eps)), "token", kl=kl, kl_form=kl_form, entropy=entropy,
        dynamic=dynamic_rounds, mask_truncated=mask_truncated,
    )  # fmt: skip


def gspo(
    *, low: float = 3e-4, high: float = 4e-4, std_eps: float = 1e-6, kl: float = 0.0, kl_form: KL = "k3", entropy: float = 0.0,
    mask_truncated: bool = False,
) -> Rule:  # fmt: skip
    """grpo with one length-normalised ratio a completion. arXiv:2507.18071; clip range the paper's, meant for batch.minibatches = 4."""
    return _rule(
        losses.gspo(low, high), (c.center(), c.scale(eps=std_eps)), "sample", kl=kl, kl_form=kl_form, entropy=entropy, mask_truncated=mask_truncated,
    )  # fmt: skip


def cispo(
    *, ratio_max: float = 5.0, ratio_min: float = 0.0, std_eps: float = 1e-6, kl: float = 0.0, kl_form: KL = "k3", entropy: float = 0.0,
    mask_truncated: bool = False,
) -> Rule:  # fmt: skip
    """grpo with (1) REINFORCE weighted by the clipped, detached ratio, so that no token loses its gradient, (2) the mean over all tokens.

    arXiv:2506.13585. ratio_max is absolute; the paper's value is undisclosed, 5.0 is OUR CHOICE.
    """
    return _rule(
        losses.cispo(ratio_max, ratio_min), (c.center(), c.scale(eps=std_eps)), "token", kl=kl, kl_form=kl_form, entropy=entropy,
        mask_truncated=mask_truncated,
    )  # fmt: skip


def rloo(
    *, kl: float = 0.05, entropy: float = 0.0, mask_truncated: bool = False,
) -> Rule:  # fmt: skip
    """REINFORCE with a leave-one-out baseline, one action a completion. arXiv:2402.14740.

    R_i = score_i - kl * sum_t (old_logp_t - ref_logp_t);  A_i = R_i - mean of the others;  loss = mean_i -A_i sum_t logp_t
    Differs from grpo: (1) baseline of the others, no std, (2) sum over a completion's tokens, no ratio (meant for one update a step),
    (3) KL (k1) in the reward. kl 0.05 is TRL's default (paper: 0.03 or 0.10); 0 makes no reference model.
    """
    shaped = (c.kl_in_reward(coef=kl),) if kl else ()
    return _rule(
        losses.reinforce(), (*shaped, c.rloo()), "fixed", budget=1, entropy=entropy,
        mask_truncated=mask_truncated, needs=Needs(ref_logp=bool(kl), old_logp=bool(kl)),
    )  # fmt: skip


def reinforce_pp(
    *, low: float = 0.2, high: float = 0.2, kl: float = 0.001, baseline: bool = False, entropy: float = 0.0,
    mask_truncated: bool = False,
) -> Rule:  # fmt: skip
    """REINFORCE++: token returns with KL in the reward, whitened over the whole batch instead of the group. arXiv:2501.03262.

    ret_t = score - kl * sum_{u >= t} (old_logp_u - ref_logp_u);  A = (ret - mean) / sqrt(var + 1e-8) over all tokens, all ranks
    Differs from grpo: (1) no group baseline, (2) whitening over the batch, (3) KL (k1) in the reward, kl 0.001 the paper's.
    baseline=True is REINFORCE++-baseline: the group's mean is taken off first (its KL form was not checked against the paper).
    """
    sample = (c.center(),) if baseline else ()
    token = ((c.kl_to_go(coef=kl),) if kl else ()) + (c.whiten(),)
    return _rule(
        losses.pg_clip(low, high), sample, "sample", token=token, entropy=entropy,
        mask_truncated=mask_truncated, needs=Needs(ref_logp=bool(kl), old_logp=bool(kl)),
    )  # fmt: skip


reinforce_pp.min_group = 1  # type: ignore[attr-defined]  # the only one here that compares no siblings
