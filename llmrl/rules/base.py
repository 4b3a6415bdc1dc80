"""The seam between a paper and the trainer: a rule is data (DESIGN section 3). Four parts: collect, credit, loss, needs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from llmrl.credit import Credit
from llmrl.records import Group, Prompt
from llmrl.rollout import RolloutIO, sample_groups

if TYPE_CHECKING:
    from torch import Tensor

    from llmrl.batch import Outputs, TokenBatch

Collect = Callable[[Sequence[Prompt], RolloutIO], Awaitable[list[Group]]]
LossFn = Callable[["TokenBatch", "Outputs"], "Tensor"]
Over = Literal["token", "sample", "fixed"]
HiddenFn = Callable[["Tensor"], "Tensor"]
"""hidden_ND of one sample -> one number, or [n_tokens] of them; pure. hidden_ND: fp32 without gradient, the last hidden layer (behind the final norm) at
the positions that predict each of its N tokens: the first is that of the context's last token, the last completion token's own is not among them."""


@dataclass(frozen=True)
class Term:
    """One summand of the loss. The core reduces it; the denominator is a sum of weights over all ranks and micro-batches.

    With w_t the tokens' weights under the name `weight`, n_i the number of tokens of sample i with w_t > 0, l_t = fn(batch, out):

    - over="token":  sum_t w_t l_t / sum_t w_t                                  (token-mean; DAPO)
    - over="sample": sum_i (1/n_i) sum_t w_t l_t / sum_i (1/n_i) sum_t w_t      (sequence mean of token means; GRPO)
    - over="fixed":  sum_t w_t l_t / (budget * sum_i (1/n_i) sum_t w_t)         (constant budget; Dr. GRPO)

    A sum over a row's tokens, mean over rows, is over="fixed" with budget=1. A weight that all samples share cancels there: one that is
    meant to scale the term (annealing), or samples that are meant to be missed where there are none, need another `count`.
    """

    fn: LossFn
    """(batch, out) -> l_T: pure, unreduced, one entry a token. A loss per sample is that number repeated along its tokens."""
    weight: str = "policy"
    over: Over = "token"
    coef: float = 1.0
    budget: int | None = None
    """Tokens; for over="fixed" only. None = the recipe's rollout.max_new_tokens."""
    count: Literal["weights", "samples", "groups"] = "weights"
    """What the denominator counts: the weights as above; or, for "sample" and "fixed", in place of sum_i (1/n_i) sum_t w_t the number of
    samples that feed the term, or the number of all groups of the update (prompts), those without such a sample too."""
    name: str = ""
    """Under which the metrics show it; default: the name of the function."""

    def __post_init__(self) -> None:
        if self.over == "token" and self.count != "weights":
            raise ValueError(f'Term {self.label}: over="token" divides by the tokens\' weights; count="{self.count}" goes with "sample" and "fixed"')

    @property
    def label(self) -> str:
        return self.name or getattr(self.fn, "__name__", "loss")


@dataclass(frozen=True)
class Needs:
    """What a rule asks of the learner beyond logp_T. Each costs something, so each is asked for."""

    ref_logp: bool = False
    """Log-probs under the frozen starting model: one more forward without gradient. Known before credit, as stream "ref_logp"."""
    old_logp: bool = False
    """Log-probs of the learner at the start of the step, known before credit as stream "old_logp". Without it the core still
    provides out.old_logp_T: from a pass of its own only where a step has several updates, else logp_T.detach()."""
    entropy: bool = False
    """Entropy of the next-token distribution, with gradient."""
    old_entropy: bool = False
    """The same at the start of the step (nats), known before credit as stream "old_entropy": one more forward without gradient."""
    hidden: dict[str, HiddenFn] = field(default_factory=dict)
    """Stream -> what it measures on a sample's hidden states under the weights at the start of the step; known before credit, a single number repeated
    along the tokens. One more forward without gradient and without the head, for all of them; no more than a micro-batch's states are ever held."""
    whole_groups: bool = False
    """All samples of a group in the same micro-batch, so that a loss may compare them."""
    ref_every: int = 0
    """With ref_logp: the reference model is the policy at the start of the present round of so many steps; 0 = at the start of the run."""


@dataclass(frozen=True)
class Rule:
    """A policy-update rule."""

    credit: Credit
    loss: tuple[Term, ...]
    collect: Collect = sample_groups
    needs: Needs = Needs()
