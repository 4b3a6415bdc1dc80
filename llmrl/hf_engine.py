"""Generates on the learner's own weights, so nothing is ever stale: continuous batching over a key-value cache of our own.

A context is prefilled once however many completions it gets, and a beginning that several contexts share once for all of them. Rows
that finish leave at once and waiting ones take their place; the rows in use are kept together at the front of the cache, so that a step
computes nothing for the finished. Randomness belongs to the request (`Request.seed`), so a completion does not depend on what else is in
the batch, up to the rounding of matrix products of another shape (fp32: about 1e-6 in a log-prob; bf16: about 1e-2, which can turn a
token that was nearly a tie).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmrl.attention import DecodePlan, PrefillPlan
from llmrl.batch import Contexts, TokenBatch, pack, seg_tokens
from llmrl.engine import draw
from llmrl.head import head_certainty, head_logp
from llmrl.models import Policy
from llmrl.records import Completion, InputError, Request, Sample, Sampling
from llmrl.rollout import philox

PREFILL_TOKENS = 4096
"""Context tokens of one prefill forward, at most (a single longer context is prefilled alone)."""
PREFILL_SCORES = 4 * PREFILL_TOKENS
"""Places of all rows of one prefill forward, at most: attention computes a shared beginning anew for each row."""


def hf(*, rows: int = 512, cache_gb: float = 4.0) -> Callable[[Policy], HFEngine]:
    """Engine on the learner's weights. rows: completions decoded side by side, at most; cache_gb: key-value cache, GB, at most."""
    if rows < 1 or cache_gb <= 0:
        raise InputError(f"[engine] hf: rows = {rows} and cache_gb = {cache_gb} must be positive")
    return lambda policy: HFEngine(policy, rows=rows, cache_gb=cache_gb)


@dataclass
class _Row:
    """A completion under way."""

    place: int
    request: Request
    u: np.ndarray
    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)


class HFEngine:
    """See the module's docstring. Not thread-safe; generation runs without gradients and leaves the model in its training mode."""

    def __init__(self, policy: Policy, *, rows: int = 512, cache_gb: float = 4.0):
        self.policy, self.rows, self.cache_gb = policy, rows, cache_gb
        self.policy_version = 0
        self.replica = False
        """Its model is a copy of a sharded learner's: set by the session."""
        config = policy.model.config.get_text_config()
        self.layers: int = config.num_hidden_layers
        self.kv_heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self.head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.max_length: int | None = getattr(config, "max_position_embeddings", None)
        self._cache: list[tuple[Tensor, Tensor]] = []

    def load_weights(self, version: int, weights: Callable[[], Any] | None) -> None:
        """Where the weights are the learner's own tensors only the version's number is taken over; a replica copies them, one at a time."""
        self.policy_version = version
        if self.replica and weights is not None:
            there = dict(self.policy.model.named_parameters())
            with torch.no_grad():
                for name, weight in weights():
                    there[name].copy_(weight)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion a request, in order."""
        if not requests:
            return []
        if not all(r.context_ids for r in requests):
            raise InputError("a request has an empty context: the first token needs something to be predicted from")
        need = max(len(r.context_ids) + r.sampling.max_new_tokens for r in requests)
        if self.max_length and need > self.max_length:
            worst = max(requests, key=lambda r: len(r.context_ids) + r.sampling.max_new_tokens)
            raise InputError(
                f"a context of {len(worst.context_ids)} tokens and max_new_tokens = {worst.sampling.max_new_tokens} exceed the model's "
                f"{self.max_length} positions: lower rollout.max_new_tokens or data.max_prompt_tokens"
            )
        training = self.policy.model.training
        self.policy.model.eval()
        try:
            with torch.inference_mode():
                return _Run(self, requests, need).finish()
        finally:
            self.policy.model.train(training)

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
        """Log-probs (nats, temperature 1, tokens that are never sampled outside the softmax) of each pair's second ids behind the first."""
        return self._read(pairs, lambda hidden_TD, b: head_logp(hidden_TD, *self.policy.head, b.tokens_T, banned_ids=self.policy.banned_ids)[0])

    def certainty(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
        """KL(uniform || p) (nats, >= 0) of the same distributions at each of the second ids: see head.head_certainty."""
        return self._read(pairs, lambda hidden_TD, b: head_certainty(hidden_TD, *self.policy.head, banned_ids=self.policy.banned_ids))

    def _read(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], f: Callable[[Tensor, TokenBatch], Tensor]) -> list[list[float]]:
        """f(hidden_TD, batch) -> [T], a number for each of the second ids, teacher-forced."""
        device, done = self.policy.device, [[] for _ in pairs]
        samples = [Sample(str(i), str(i), list(c), list(t), None, self.policy_version) for i, (c, t) in enumerate(pairs) if t]
        training = self.policy.model.training
        self.policy.model.eval()
        try:
            with torch.inference_mode():
                for batch in pack(samples, [torch.zeros(len(s.token_ids)) for s in samples], tokens=PREFILL_TOKENS):
                    b = batch.to(device)
                    hidden_TD = self.policy.hidden(b.ids_P, b.positions_P, b.plan(self.policy.kernel)).index_select(0, b.source_T)
                    for k, own in zip(b.sample_index, seg_tokens(f(hidden_TD, b), b), strict=True):
                        done[int(samples[k].id)] = own.tolist()
        finally:
            self.policy.model.train(training)
        return done

    def cache(self, length: int, wanted: int) -> tuple[list[tuple[Tensor, Tensor]], int]:
        """(cache of at least `length` places, number of rows it has). Kept between calls while it fits."""
        dtype = self.policy.model.dtype
        row_bytes = 2 * self.layers * self.kv_heads * self.head_dim * length * dtype.itemsize
        rows = max(1, min(self.rows, wanted, int(self.cache_gb * 1e9 // row_bytes)))
        if not self._cache or self._cache[0][0].shape[0] < rows or self._cache[0][0].shape[2] < length:
            self._cache = []  # freed before the new one is made
            shape = (rows, self.kv_heads, length, self.head_dim)
            self._cache = [tuple(torch.zeros(shape, dtype=dtype, device=self.policy.device) for _ in "kv") for _ in range(self.layers)]  # type: ignore[misc]
        return self._cache, rows

    def release(self) -> None:
        """Gives the cache's memory back; the next call makes a new one."""
        self._cache = []


def prefill_parts(contexts: Iterable[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """Contexts dealt out to prefill forwards; in order of their tokens, so that those with a common beginning meet."""
    parts: list[list[tuple[int, ...]]] = []
    laid, longest = Contexts(), 0
    for c in sorted(contexts):
        laid.add(c)
        longest = max(longest, len(c))
        if not parts or len(laid.ids) > PREFILL_TOKENS or (len(parts[-1]) + 1) * longest > PREFILL_SCORES:
            laid, longest = Contexts(), len(c)
            laid.add(c)
            parts.append([])
        parts[-1].append(c)
    return parts


class _Run:
    """One call of generate."""

    def __init__(self, engine: HFEngine, requests: Sequence[Request], length: int):
        self.engine, self.policy, self.requests = engine, engine.policy, requests
        self.cache, self.n_rows = engine.cache(length, len(requests))
        self.waiting = list(range(len(requests)))[::-1]
        self.unborn = Counter(r.context_ids for r in requests)  # contexts that waiting requests still need
        self.contexts: dict[tuple[int, ...], tuple[list[tuple[Tensor, Tensor]], Tensor]] = {}  # prefilled: (keys and values a layer, last logits)
        self.live: list[_Row] = []
        self.done: dict[int, Completion] = {}

    def finish(self) -> list[Completion]:
        while self.waiting or self.live:
            free = self.n_rows - len(self.live)
            # entering in batches keeps the prefills large; an empty batch or a quarter of free rows is worth one
            if self.waiting and (not self.live or free >= max(1, self.n_rows // 4)):
                self.enter(free)
            else:
                self.step()
        return [self.done[i] for i in range(len(self.requests))]

    def enter(self, free: int) -> None:
        """Waiting requests take free rows; contexts not seen yet are prefilled."""
        chosen = [self.waiting.pop() for _ in range(min(free, len(self.waiting)))]
        fresh = dict.fromkeys(c for i in chosen if (c := self.requests[i].context_ids) not in self.contexts)
        for part in prefill_parts(fresh):
            self.prefill(part)
        rows, logits = [], []
        first = len(self.live)
        for k, i in enumerate(chosen):
            request = self.requests[i]
            kv, last = self.contexts[request.context_ids]
            for (K, V), (k_c, v_c) in zip(self.cache, kv, strict=True):
                K[first + k, :, : k_c.shape[1]], V[first + k, :, : v_c.shape[1]] = k_c, v_c
            rows.append(_Row(i, request, philox(request.seed).random(request.sampling.max_new_tokens)))
            logits.append(last)
            self.unborn[request.context_ids] -= 1
            if not self.unborn[request.context_ids]:
                del self.contexts[request.context_ids]
        self.live += rows
        self.take(torch.stack(logits), rows)

    def prefill(self, contexts: list[tuple[int, ...]]) -> None:
        """One packed forward over contexts, beginnings that they share once; keeps their keys, values and the logits after each."""
        device = self.policy.device
        laid = Contexts()
        rows = [laid.add(c) for c in contexts]
        longest = max(map(len, rows))
        pick: dict[int, int] = {}
        for r, row in enumerate(rows):
            for j, place in enumerate(row):
                pick.setdefault(place, r * longest + j)
        index = torch.tensor([row + [row[-1]] * (longest - len(row)) for row in rows], device=device)
        plan = PrefillPlan(index, torch.tensor([pick[place] for place in range(len(laid.ids))], device=device), self.policy.kernel)
        hidden = self.policy.hidden(torch.tensor(laid.ids, device=device), torch.tensor(laid.positions, device=device), plan)
        last = self.policy.logits(hidden[torch.tensor([row[-1] for row in rows], device=device)])
        for r, (c, row) in enumerate(zip(contexts, rows, strict=True)):
            own = torch.tensor(row, device=device)
            kv = [tuple(x[own].transpose(0, 1) for x in plan.kv[layer]) for layer in range(self.engine.layers)]
            self.contexts[c] = (kv, last[r])  # type: ignore[assignment]

    def step(self) -> None:
        """One more token for every live row."""
        device = self.policy.device
        position = torch.tensor([len(r.request.context_ids) + len(r.ids) - 1 for r in self.live], device=device)
        token = torch.tensor([r.ids[-1] for r in self.live], device=device)
        hidden = self.policy.hidden(token, position, DecodePlan(self.cache, position, self.policy.kernel))
        self.take(self.policy.logits(hidden), self.live)

    def take(self, logits: Tensor, rows: list[_Row]) -> None:
        """Draws a token for each of `rows` and retires those that end with it."""
        kinds: dict[Sampling, list[int]] = {}
        for k, row in enumerate(rows):
            kinds.setdefault(row.request.sampling, []).append(k)
        for how, members in kinds.items():
            u = torch.tensor([rows[k].u[len(rows[k].ids)] for k in members], dtype=torch.float64, device=logits.device)
            part = logits if len(members) == len(rows) else logits[torch.tensor(members, device=logits.device)]
            tokens, logps = draw(part, how, u)
            for k, token, logp in zip(members, tokens.tolist(), logps.tolist(), strict=True):
                rows[k].ids.append(token)
                rows[k].logps.append(logp)
        ended = [row for row in rows if self.ends(row)]
        if ended:
            self.retire({id(row) for row in ended})

    def ends(self, row: _Row) -> bool:
        how = row.request.sampling
        stopped = row.ids[-1] in self.policy.stop_ids
        if not stopped and how.stop:
            tail = self.policy.chat.text(row.ids[-(max(map(len, how.stop)) + 8) :])
            stopped = any(s in tail for s in how.stop)
        if stopped or len(row.ids) >= how.max_new_tokens:
            text = self.policy.chat.text(row.ids)
            self.done[row.place] = Completion(row.ids, row.logps, "stop" if stopped else "length", self.engine.policy_version, text)
            return True
        return False

    def retire(self, ended: set[int]) -> None:
        """Drops rows and moves the last live ones into the holes they leave."""
        left = len(self.live) - len(ended)
        holes = [k for k in range(left) if id(self.live[k]) in ended]
        movers = [k for k in range(left, len(self.live)) if id(self.live[k]) not in ended]
        if holes:
            to, source = torch.tensor(holes, device=self.policy.device), torch.tensor(movers, device=self.policy.device)
            length = max(len(self.live[k].request.context_ids) + len(self.live[k].ids) for k in movers)
            for K, V in self.cache:
                K[to, :, :length], V[to, :, :length] = K[source, :, :length], V[source, :, :length]
            for hole, mover in zip(holes, movers, strict=True):
                self.live[hole] = self.live[mover]
        del self.live[left:]
