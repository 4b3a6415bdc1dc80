"""Sampling from logits, and `TableEngine`: a scripted engine for tests and dry runs. The Engine protocol itself is in records.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llmrl.chat import Chat
from llmrl.records import Completion, Request, Sampling


def truncate_logits(logits_NV: Tensor, how: Sampling) -> Tensor:
    """logits / temperature with the tokens outside top-k, top-p and min-p at -inf (fp32, a new tensor). Needs temperature > 0.

    top_p keeps the smallest set of most likely tokens whose probabilities reach top_p; min_p those of at least min_p times the largest.
    """
    x = logits_NV / how.temperature
    if how.top_k:
        kth = x.topk(min(how.top_k, x.shape[-1]), dim=-1).values[:, -1:]
        x = x.masked_fill(x < kth, -torch.inf)
    if how.min_p:
        top = x.max(-1, keepdim=True).values
        x = x.masked_fill(x < top + torch.log(torch.tensor(how.min_p)), -torch.inf)
    if how.top_p < 1.0:
        values, order = x.sort(-1, descending=True)
        before = values.softmax(-1).cumsum(-1) - values.softmax(-1)
        cut = torch.zeros_like(x, dtype=torch.bool).scatter(1, order, before >= how.top_p)
        x = x.masked_fill(cut, -torch.inf)
    return x


def draw(logits_NV: Tensor, how: Sampling, u_N: Tensor) -> tuple[Tensor, Tensor]:
    """One token a row by inverting the distribution function at u in [0, 1): (token [N] long, log-prob [N] fp32 of what was sampled from).

    A row's token depends on its own logits and its own u only. Temperature 0 is the arg max, with log-prob 0.
    """
    if how.temperature == 0:
        token = logits_NV.argmax(-1)
        return token, torch.zeros(len(token), device=token.device)
    logp = truncate_logits(logits_NV, how).log_softmax(-1)
    p = logp.exp()
    cdf = p.cumsum(-1)
    total = cdf[:, -1:]
    below = torch.minimum(u_N.to(cdf)[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))  # u may round up to 1
    token = torch.searchsorted(cdf, below, right=True)[:, 0].clamp(max=p.shape[-1] - 1)
    # sums that are not quite monotonic (GPU) can hit a token of probability 0
    token = torch.where(p.gather(1, token[:, None])[:, 0] > 0, token, p.argmax(-1))
    return token, logp.gather(1, token[:, None])[:, 0]


class TableEngine:
    """Answers from a script: `reply(request) -> text` (or token ids). Every token gets log-prob `logp`; scores: `judge(context, ids)`, too."""

    def __init__(
        self, chat: Chat, reply: Callable[[Request], str | list[int]], *, logp: float = -0.5,
        judge: Callable[[Sequence[int], Sequence[int]], list[float]] | None = None,
    ) -> None:  # fmt: skip
        self.chat, self.reply, self.logp, self.judge = chat, reply, logp, judge
        self.policy_version = 0

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
        return [self.judge(context, ids) if self.judge else [self.logp] * len(ids) for context, ids in pairs]

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        done = []
        for r in requests:
            said = self.reply(r)
            ids = self.chat.completion_ids(said) if isinstance(said, str) else list(said)
            ids = ids[: r.sampling.max_new_tokens]
            finish = "stop" if ids and ids[-1] == self.chat.tokenizer.eos_token_id else "length"
            done.append(Completion(ids, [self.logp] * len(ids), finish, self.policy_version, self.chat.text(ids)))
        return done

    def load_weights(self, version: int, weights: Callable[[], Any] | None) -> None:
        self.policy_version = version
