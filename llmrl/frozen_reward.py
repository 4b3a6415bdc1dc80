"""A reward model that scores token ids or embeddings of them, and gives its gradient with respect to the latter. Its weights never learn here."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmrl.records import InputError

Item = tuple[Sequence[int], Sequence[int]]
"""(context ids, response ids)"""


class RewardModel:
    """A frozen decoder with a scalar head (transformers' ...ForSequenceClassification, one label), read at the last token.

    "Last" is as transformers has it: the last one that is not config.pad_token_id. `rows` x longest <= `tokens` in one forward.
    """

    def __init__(self, model: Any, tokenizer: Any, *, tokens: int = 8192):
        if not hasattr(model, "score") or model.config.num_labels != 1:
            told = f"{type(model).__name__} with {model.config.num_labels} labels"
            raise InputError(f"reward model: {told}; transport needs a decoder with a head `score` of one label (LlamaForSequenceClassification and its like)")
        self.model, self.tokenizer, self.tokens = model.requires_grad_(False).eval(), tokenizer, tokens
        self._rho: dict[int, float] = {}
        self._shared: Any = None
        self._head: Tensor | None = None

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu", *, dtype: str = "float32") -> RewardModel:
        """From a transformers folder with a tokenizer. InputError where there is none, or where its head has no trained weights."""
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        if not Path(folder).is_dir():
            raise InputError(f"reward model: there is no folder {folder}; `llmrl reward` makes one")
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            model, told = AutoModelForSequenceClassification.from_pretrained(
                folder, trust_remote_code=False, dtype=getattr(torch, dtype), output_loading_info=True
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise InputError(f"reward model: {folder} holds no sequence-classification model and tokenizer: {str(error)[:500]}") from error
        if told["missing_keys"]:  # transformers fills a missing head with random numbers
            raise InputError(f"reward model: {folder} has no trained weights for {sorted(told['missing_keys'])[:5]}; it is no reward model")
        return cls(model.to(device), tokenizer)

    @property
    def table(self) -> Tensor:
        """The input embeddings, [V, D]."""
        return self.model.get_input_embeddings().weight

    @property
    def slope(self) -> Tensor:
        """The head's weights, [D]: the reward is <slope, last hidden state> and a constant."""
        return self.model.score.weight.detach()[0] if self._head is None else self._head

    def with_head(self, slope_D: Tensor) -> RewardModel:
        """The same backbone under another head without a constant: a value of its own, to be followed like the reward."""
        other = copy.copy(self)
        other._head = slope_D.detach()
        return other

    def score(self, items: Sequence[Item]) -> list[float]:
        """The reward of each response. No gradient."""
        if not items:
            return []
        ids, lengths = padded([t for _, t in items])
        with torch.no_grad():
            return self.value([c for c, _ in items], ids, lengths, self.table[ids.to(self.table.device)]).tolist()

    def features(self, items: Sequence[Item]) -> Tensor:
        """The last hidden state that the head reads, [N, D] fp32 on the CPU. No gradient."""
        ids, lengths = padded([t for _, t in items])
        out = torch.empty(len(items), self.slope.shape[0])
        for rows in self._rows([c for c, _ in items], lengths):
            with torch.no_grad():
                u = self.table[ids[rows].to(self.table.device)]
                out[rows] = self._hidden([items[i][0] for i in rows], ids[rows], [lengths[i] for i in rows], u).float().cpu()
        return out

    def value(self, contexts: Sequence[Sequence[int]], ids_NT: Tensor, lengths: Sequence[int], u_NTD: Tensor) -> Tensor:
        """Reward [N] of responses given as embeddings, differentiable in u. ids_NT says which place is the last one (see the class)."""
        out: list[Tensor | None] = [None] * len(contexts)
        for rows in self._rows(contexts, lengths):
            some = self._forward([contexts[i] for i in rows], ids_NT[rows], [lengths[i] for i in rows], u_NTD[rows])
            for i, r in zip(rows, some.unbind(), strict=True):
                out[i] = r
        return torch.stack([r for r in out if r is not None])

    def slopes(self, contexts: Sequence[Sequence[int]], ids_NT: Tensor, lengths: Sequence[int], u_NTD: Tensor) -> tuple[Tensor, Tensor]:
        """(reward [N], its gradient in u [N, T, D]), both detached. Weights, table and contexts receive none."""
        r, g = u_NTD.new_zeros(len(contexts)), torch.zeros_like(u_NTD)
        for rows in self._rows(contexts, lengths):
            own = [contexts[i] for i in rows], ids_NT[rows], [lengths[i] for i in rows]
            with torch.enable_grad():
                u = u_NTD[rows].detach().requires_grad_()
                value = self._forward(*own, u)
                (g[rows],) = torch.autograd.grad(value.sum(), u)
            r[rows] = value.detach().to(r.dtype)
        return r, g

    def rho(self, seed: int = 0, *, rows: int = 2048) -> float:
        """Median distance of a row of the table to its nearest other one; over `rows` rows drawn by seed where the table has more."""
        if seed not in self._rho:
            table = self.table.detach().float()
            own = torch.arange(len(table))
            if len(table) > rows:
                own = torch.randperm(len(table), generator=torch.Generator().manual_seed(seed))[:rows]
            own = own.to(table.device)
            near = [nearest_other(table, part) for part in own.split(256)]
            self._rho[seed] = float(torch.cat(near).median())
            if not self._rho[seed] > 0:
                raise InputError("reward model: most rows of its embedding table are equal, so there is no distance to the next token; train it first")
        return self._rho[seed]

    def must_share(self, tokenizer: Any) -> None:
        """InputError where the policy's tokenizer is another one: its ids would be other words."""
        if self._shared is not tokenizer:
            mine, theirs = self.tokenizer.get_vocab(), tokenizer.get_vocab()
            if mine != theirs:
                raise InputError(
                    f"reward model: its tokenizer ({len(mine)} tokens) is not the policy's ({len(theirs)}); transport moves tokens of one vocabulary. "
                    "Train the reward model on the policy's own base model"
                )
            self._shared = tokenizer

    def free(self, *, fixed: Sequence[int] = ()) -> Tensor:
        """bool [V]: tokens that may be moved and that decoding may choose; special ones, `fixed` ones and unused rows are not."""
        tok, free = self.tokenizer, torch.zeros(len(self.table), dtype=torch.bool)
        free[: len(tok)] = True
        added = {i for i, t in getattr(tok, "added_tokens_decoder", {}).items() if t.special}
        free[sorted({*tok.all_special_ids, *added, *fixed} & set(range(len(free))))] = False
        return free

    def _rows(self, contexts: Sequence[Sequence[int]], lengths: Sequence[int]) -> Iterator[list[int]]:
        """Numbers of responses of similar length, so that little is padded."""
        size = [len(c) + n for c, n in zip(contexts, lengths, strict=True)]
        part: list[int] = []
        for i in sorted(range(len(size)), key=lambda i: size[i]):
            if part and (len(part) + 1) * size[i] > self.tokens:
                yield part
                part = []
            part.append(i)
        if part:
            yield part

    def _forward(self, contexts: Sequence[Sequence[int]], ids_NT: Tensor, lengths: Sequence[int], u_NTD: Tensor) -> Tensor:
        hidden = self._hidden(contexts, ids_NT, lengths, u_NTD)
        return (self.model.score(hidden)[:, 0] if self._head is None else hidden @ self._head.to(hidden)).to(u_NTD.dtype)

    def _hidden(self, contexts: Sequence[Sequence[int]], ids_NT: Tensor, lengths: Sequence[int], u_NTD: Tensor) -> Tensor:
        table, pad = self.table, self.model.config.get_text_config().pad_token_id
        device = table.device
        longest = max(len(c) + n for c, n in zip(contexts, lengths, strict=True))
        ids = torch.zeros(len(contexts), longest, dtype=torch.long)
        mask, last = torch.zeros_like(ids), []
        row, to, at = [], [], []
        for i, (c, n) in enumerate(zip(contexts, lengths, strict=True)):
            whole = [*c, *ids_NT[i, :n].tolist()]
            ids[i, : len(whole)], mask[i, : len(whole)] = torch.tensor(whole), 1
            last.append(max((k for k, x in enumerate(whole) if x != pad), default=len(whole) - 1))
            row, to, at = row + [i] * n, to + list(range(len(c), len(c) + n)), at + list(range(n))
        embedded = table.detach()[ids.to(device)]
        r, t, a = (torch.tensor(x, device=device) for x in (row, to, at))
        embedded = embedded.index_put((r, t), u_NTD.to(device, table.dtype)[r, a])
        hidden = self.model.base_model(inputs_embeds=embedded, attention_mask=mask.to(device), use_cache=False).last_hidden_state
        return hidden[torch.arange(len(last), device=device), torch.tensor(last, device=device)]


def nearest_other(table_VD: Tensor, rows: Tensor) -> Tensor:
    """Distance of each of these rows to the nearest other row."""
    some = table_VD[rows]
    d2 = some.square().sum(1)[:, None] + table_VD.square().sum(1) - 2 * some @ table_VD.T
    d2[torch.arange(len(rows), device=rows.device), rows] = torch.inf
    return (some - table_VD[d2.argmin(1)]).norm(dim=1)  # the difference itself: no cancellation


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, list[int]]:
    lengths = [len(r) for r in rows]
    ids = torch.zeros(len(rows), max(lengths), dtype=torch.long)
    for i, r in enumerate(rows):
        ids[i, : len(r)] = torch.tensor(r, dtype=torch.long)
    return ids, lengths
