"""Losses: pure, unreduced, one entry a token (l_T), to be minimised. Weights and denominators are the `Term`'s affair.

Factories take numbers and return `fn(batch, out) -> l_T`. All ratios are `exp(logp - old_logp)` with the log-ratio clamped to
[-20, 20] as in verl. Gradients flow through `out.logp_T` (and `out.entropy_T`) only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from llmrl.segment import seg_mean, seg_sum

if TYPE_CHECKING:
    from llmrl.batch import Outputs, TokenBatch

LossFn = Callable[["TokenBatch", "Outputs"], Tensor]


def scales_with_advantage(fn: LossFn) -> LossFn:
    """Marks a loss that is 0, gradient included, wherever the advantage is 0: samples without advantage then need no forward."""
    fn.scales_with_advantage = True  # type: ignore[attr-defined]
    return fn


def asks(*streams: str) -> Callable[[LossFn], LossFn]:
    """Marks what a loss reads beyond logp_T, by the names of `Needs`: where a recipe adds the term, the rule then asks for it."""

    def mark(fn: LossFn) -> LossFn:
        fn.asks = streams  # type: ignore[attr-defined]
        return fn

    return mark


def log_ratio(a_T: Tensor, b_T: Tensor) -> Tensor:
    """a - b, clamped to [-20, 20] nats."""
    return (a_T - b_T).clamp(-20.0, 20.0)


def pg_clip(low: float = 0.2, high: float = 0.2, *, dual: float | None = None) -> LossFn:
    """Clipped policy-gradient loss per token.

    l_t = max(-r_t A_t, -clip(r_t, 1 - low, 1 + high) A_t),  r_t = exp(logp_t - old_logp_t);  dual: l_t <= -dual * A_t where A_t < 0
    Source: PPO, arXiv:1707.06347 eq. 7; low != high: DAPO, arXiv:2503.14476; dual clip: arXiv:1912.09729 (verl: always on, 3).
    Differs: not averaged (the Term decides); r is per token, for one r per sample see gspo.
    """

    @scales_with_advantage
    def pg_clip(batch: TokenBatch, out: Outputs) -> Tensor:
        r = log_ratio(out.logp_T, out.old_logp_T).exp()
        a = batch.adv_T
        loss = torch.maximum(-r * a, -r.clamp(1 - low, 1 + high) * a)
        return loss if dual is None else torch.where(a < 0, torch.minimum(loss, -dual * a), loss)

    pg_clip.clip_bounds = (1 - low, 1 + high, "token")  # type: ignore[attr-defined]
    return pg_clip


def on_channel(fn: LossFn, name: str) -> LossFn:
    """The same loss with another advantage: batch.stream[name], which Credit(channels={name: ...}) gives. For a second term of a rule."""

    def on_channel(batch: TokenBatch, out: Outputs) -> Tensor:
        if name not in batch.stream:
            raise ValueError(f"no stream {name!r}: the rule's Credit must have a channel of that name")
        return fn(replace(batch, adv_T=batch.stream[name].to(batch.adv_T)), out)

    on_channel.__name__ = f"{getattr(fn, '__name__', 'loss')}_{name}"
    on_channel.scales_with_channel = name  # type: ignore[attr-defined]
    return on_channel


def reinforce() -> LossFn:
    """l_t = -A_t logp_t. Source: Williams 1992; used per row by RLOO, arXiv:2402.14740. No ratio: for single updates."""

    @scales_with_advantage
    def reinforce(batch: TokenBatch, out: Outputs) -> Tensor:
        return -batch.adv_T * out.logp_T

    return reinforce


def cispo(ratio_max: float = 5.0, ratio_min: float = 0.0) -> LossFn:
    """l_t = -sg(clip(r_t, ratio_min, ratio_max)) A_t logp_t: no token loses its gradient.

    Source: CISPO / MiniMax-M1, arXiv:2506.13585. The bounds are absolute (TRL's epsilon_high); the paper and verl write the upper
    one as 1 + epsilon. The paper's value is undisclosed; 5.0 is OUR CHOICE (ScaleRL's recommendation).
    """

    @scales_with_advantage
    def cispo(batch: TokenBatch, out: Outputs) -> Tensor:
        r = log_ratio(out.logp_T, out.old_logp_T).exp().clamp(ratio_min, ratio_max).detach()
        return -r * batch.adv_T * out.logp_T

    return cispo


def gspo(low: float = 3e-4, high: float = 4e-4) -> LossFn:
    """Sequence-ratio clipped loss, GSPO-token form.

    log s_i = mean_t (logp_t - old_logp_t) over the sample's tokens;  s_it = sg(s_i) exp(logp_t - sg(logp_t));
    l_t = max(-s_it A_t, -clip(s_it, 1 - low, 1 + high) A_t)
    Source: GSPO, arXiv:2507.18071 eq. 5-7 and 13-14; with one advantage a sample and over="sample" it equals plain GSPO in value and
    gradient. Under token-level mismatch weights the gradient weighs each token by its own, the value is the same. The mean runs over
    tokens with a positive "policy" weight.
    """

    @scales_with_advantage
    def gspo(batch: TokenBatch, out: Outputs) -> Tensor:
        where = batch.weight["policy"] > 0
        mean = seg_mean((out.logp_T - out.old_logp_T).detach(), batch.sample_T, batch.n_samples, where)[batch.sample_T]
        mean = torch.where(where, mean, 0.0)  # a sample of weight 0 has no mean, and 0 * NaN is NaN in the backward pass
        s = mean.clamp(max=10.0).exp() * (out.logp_T - out.logp_T.detach()).exp()
        loss = torch.maximum(-s * batch.adv_T, -s.clamp(1 - low, 1 + high) * batch.adv_T)
        return torch.where(where, loss, 0.0)

    gspo.clip_bounds = (1 - low, 1 + high, "sample")  # type: ignore[attr-defined]
    return gspo


def ce() -> LossFn:
    """l_t = -logp_t: cross-entropy on the sampled tokens, in nats; supervised warm start and imitation terms."""

    def ce(batch: TokenBatch, out: Outputs) -> Tensor:
        return -out.logp_T

    return ce


def dpo(beta: float = 0.1, *, weight: str = "pair") -> LossFn:
    """Direct preference optimisation, one number a pair, repeated along the tokens of both its samples: for Terms over="sample".

    l = -log sigmoid(beta * [(log pi(y_w) - log ref(y_w)) - (log pi(y_l) - log ref(y_l))]),  log pi(y) = sum of the sample's logp_T
    Source: DPO, arXiv:2305.18290 eq. 7. A pair is a cohort of two samples with a positive `weight`; that of the higher reward is preferred.
    Needs(ref_logp=True, whole_groups=True). Raises ValueError where a cohort is no pair, or its rewards are equal or missing.
    """

    def dpo(batch: TokenBatch, out: Outputs) -> Tensor:
        margin_S = _pair_margin("dpo", batch, out.logp_T - _ref(out), weight)
        return -torch.nn.functional.logsigmoid(beta * margin_S)[batch.sample_T]

    return dpo


def inpo(eta: float = 7.5e-3, tau: float = 2.5e-3, *, weight: str = "pair") -> LossFn:
    """Nash regression on pairs, one number a pair, repeated along the tokens of both its samples: for Terms over="sample".

    l = (h - 1 / (2 eta))^2,  h = D - (tau / eta) D_ref - (1 - tau / eta) D_t;  D = log pi(y_w) - log pi(y_l), sums over the tokens
    D_ref is D under the reference model, D_t under the policy that the pair was sampled from: old_logp, the learner at the start of the step.
    Source: INPO, arXiv:2407.00617. Pairs, needs and errors as in dpo. Nats squared; the target 1 / (2 eta) is finite: no margin grows without bound.
    """

    def inpo(batch: TokenBatch, out: Outputs) -> Tensor:
        h_S = _pair_margin("inpo", batch, out.logp_T - tau / eta * _ref(out) - (1 - tau / eta) * out.old_logp_T, weight)
        return ((h_S - 0.5 / eta) ** 2)[batch.sample_T]

    return inpo


def _pair_margin(who: str, batch: TokenBatch, x_T: Tensor, weight: str) -> Tensor:
    """Sum of x over the preferred sample's tokens less that over the other's, at both samples of a pair, [S]."""
    n, on_S = batch.n_samples, seg_sum((batch.weight[weight] > 0).float(), batch.sample_T, batch.n_samples) > 0
    x_S = seg_sum(x_T, batch.sample_T, n)
    off_S = batch.reward_S - seg_mean(batch.reward_S, batch.cohort_S, n, on_S)[batch.cohort_S]
    size_S = seg_sum(on_S.float(), batch.cohort_S, n)[batch.cohort_S]
    if bool((on_S & ~((size_S == 2) & (off_S.abs() > 0))).any()):
        raise ValueError(f"{who}: a cohort is no pair of samples with different rewards; the rule must have Needs(whole_groups=True) and give pairs")
    sign_S = torch.where(on_S, off_S, 0.0).sign().to(x_S)
    return seg_sum(sign_S * x_S, batch.cohort_S, n)[batch.cohort_S]


def kl_k1() -> LossFn:
    """logp - ref_logp: unbiased for KL(pi, ref) as a value, but its plain gradient is zero in expectation: use it to monitor.

    Source for k1, k2, k3: Schulman, "Approximating KL divergence" (2020).
    """

    @asks("ref_logp")
    def kl_k1(batch: TokenBatch, out: Outputs) -> Tensor:
        return out.logp_T - _ref(out)

    kl_k1.monitors = True  # type: ignore[attr-defined]
    return kl_k1


def kl_k2() -> LossFn:
    """(logp - ref_logp)^2 / 2: biased value, gradient of KL(pi, ref) when on-policy."""

    @asks("ref_logp")
    def kl_k2(batch: TokenBatch, out: Outputs) -> Tensor:
        return 0.5 * (out.logp_T - _ref(out)) ** 2

    return kl_k2


def kl_k3() -> LossFn:
    """exp(ref - logp) - (ref - logp) - 1 >= 0. Source: GRPO, arXiv:2402.03300 eq. 4. Log-ratio clamped to [-20, 20]."""

    @asks("ref_logp")
    def kl_k3(batch: TokenBatch, out: Outputs) -> Tensor:
        d = log_ratio(_ref(out), out.logp_T)
        return d.exp() - d - 1

    return kl_k3


def entropy_bonus() -> LossFn:
    """-H_t in nats, H_t the entropy of the next-token distribution: a positive `coef` raises entropy. Needs(entropy=True)."""

    @asks("entropy")
    def entropy_bonus(batch: TokenBatch, out: Outputs) -> Tensor:
        if out.entropy_T is None:
            raise ValueError("entropy_bonus: the rule must have Needs(entropy=True)")
        return -out.entropy_T

    return entropy_bonus


def mismatch(
    fn: LossFn, how: Literal["truncate", "mask"] = "truncate", *, ratio_max: float = 2.0, ratio_min: float = 0.0, over: Literal["token", "sample"] = "token"
) -> LossFn:
    """Multiplies a loss by importance weights that correct the engine's mismatch: rho_t = exp(old_logp_t - behavior_logp_t), detached.

    over="sample": rho_i = exp(sum over the sample's tokens), one weight a sample. truncate: min(rho, ratio_max) (TIS); mask: rho where
    ratio_min <= rho <= ratio_max, else 0 (MIS, IcePop). Denominators keep the masked tokens (as in TRL; verl removes them), since they
    are known before the forward. Source: TIS, Yao et al. 2025; MIS, Liu and Li et al. 2025; token masking, arXiv:2510.18855. The caps
    2.0 (token TIS) and 3.0 (sequence MIS) are OUR CHOICE. Tokens without behavior_logp get weight 1.
    """

    def corrected(batch: TokenBatch, out: Outputs) -> Tensor:
        gap = (out.old_logp_T - batch.behavior_logp_T).detach()
        gap = torch.where(gap.isnan(), 0.0, gap)
        if over == "sample":
            gap = seg_sum(gap, batch.sample_T, batch.n_samples)[batch.sample_T]
        rho = gap.clamp(-20.0, 20.0).exp()
        weight = rho.clamp(max=ratio_max) if how == "truncate" else torch.where((rho >= ratio_min) & (rho <= ratio_max), rho, 0.0)
        return weight * fn(batch, out)

    corrected.__name__ = getattr(fn, "__name__", "loss")
    for mark in ("scales_with_advantage", "scales_with_channel", "clip_bounds"):
        if hasattr(fn, mark):
            setattr(corrected, mark, getattr(fn, mark))
    corrected.corrects_mismatch = True  # type: ignore[attr-defined]
    return corrected


def _ref(out: Outputs) -> Tensor:
    if out.ref_logp_T is None:
        raise ValueError("a KL loss needs reference log-probs: the rule must have Needs(ref_logp=True)")
    return out.ref_logp_T
