"""What the rule `vgf` does to the samples of a step before they are chosen from: transport, and the verifier's view of what came out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from llmrl import lm_transport as lm
from llmrl.records import Group, InputError, Prompt, Sample, Verdict
from llmrl.rollout import RolloutIO, sample_groups, timed
from llmrl.rules.vgf_value import ValueHead


@dataclass
class Carrier:
    """The reward model of a rule, loaded when first used, and how it moves samples."""

    folder: Path
    device: str
    dtype: str
    move: dict
    """keywords of lm_transport.transport"""
    head: ValueHead | None = None
    """of the value that is followed; None = the reward model's own"""
    _model: lm.RewardModel | None = field(default=None, repr=False)

    @property
    def model(self) -> lm.RewardModel:
        """The frozen reward model."""
        if self._model is None:
            device = self.device
            if device == "auto":
                # a rank that sees only its own card has a local rank beyond the number of cards that it sees
                device = f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
            self._model = lm.RewardModel.load(self.folder, device, dtype=self.dtype)
        return self._model

    def followed(self, io: RolloutIO) -> lm.RewardModel:
        """The value whose gradient this step's samples go along."""
        return self.model if self.head is None else self.head.model(self.model, io)

    def __call__(self, samples: Sequence[Sample], io: RolloutIO, value: lm.RewardModel) -> list[lm.Moved]:
        """One Moved a sample, along the gradient of `value`; the metrics of the transport are noted."""
        items = [(s.context_ids, s.token_ids) for s in samples]
        value.must_share(io.chat.tokenizer)

        def logp(pairs: Sequence[lm.Item]) -> list[list[float]]:
            return io.score([c for c, _ in pairs], [t for _, t in pairs])

        # an engine of this process holds the weights that sample, so that all is as at test time; of one elsewhere only log-probs are to be had
        reference = getattr(io.engine, "policy", None) or logp
        if reference is logp and self.move["candidates"]:
            raise InputError("[rule] candidates needs an engine that holds the policy in this process (engine.use = hf): a server gives no whole distributions")
        with timed(io.seconds, "transport"):
            moved = lm.transport(reference, value, items, **self.move)
            told = lm.diagnostics(items, moved, space=self.model)
        tried = sum(bool(m.changed_share) or not m.kept for m in moved)
        names = {"reward_before": "reward/before", "reward_flowed": "reward/flowed", "reward_after": "reward/after", "changed_share": "changed_share",
                 "moved_share": "moved_share", "displacement": "displacement"}  # fmt: skip
        for name, shown in names.items():
            note(io, shown, told[name] * len(moved), len(moved))
        note(io, "ref_drop_nats", told["ref_drop"] * tried, tried)
        note(io, "guarded_share", told["guarded_share"] * tried, tried)
        prompts = len({tuple(c) for c, _ in items})
        note(io, "mmd", told["mmd"] * prompts, prompts)
        return moved


def note(io: RolloutIO, name: str, total: float, n: int) -> None:
    """A mean of n values, where there are any."""
    if n:  # 0 would make a sum of it
        io.note(name, total, n)


@dataclass(frozen=True)
class Candidate:
    """A text that may be trained on."""

    sample: Sample
    value: float
    """The reward model's, or the value head's that was followed."""

    @property
    def score(self) -> float | None:
        """The verifier's."""
        return self.sample.reward


async def carried(prompts: Sequence[Prompt], io: RolloutIO, carrier: Carrier) -> list[tuple[Group, list[Candidate], list[Candidate | None]]]:
    """The default collect; then of each group its sampled texts and, for each, the one that transport made of it: None where it is the same."""
    groups = await sample_groups(prompts, io)
    own = [(g, s) for g in groups for s in g.samples]
    value = carrier.followed(io)
    moved = carrier([s for _, s in own], io, value)
    changed = [k for k, m in enumerate(moved) if m.changed_share]
    texts = {k: io.chat.text(moved[k].token_ids) for k in changed}
    verdicts = dict(zip(changed, await io.verify([(own[k][0].prompt, texts[k]) for k in changed]) if changed else [], strict=True))
    pairs = [(own[k][1].reward, verdicts[k].score if k in verdicts else own[k][1].reward) for k in range(len(own))]
    judged = [(a, b) for a, b in pairs if a is not None and b is not None]
    note(io, "score/before", sum(a for a, _ in judged), len(judged))
    note(io, "score/after", sum(b for _, b in judged), len(judged))
    found, at = [], 0
    for g in groups:
        here = range(at, at + len(g.samples))
        at += len(g.samples)
        sampled = [Candidate(own[k][1], moved[k].reward_before) for k in here]
        made = [Candidate(_sample(own[k][1], moved[k], texts[k], verdicts[k]), moved[k].reward_after) if k in texts else None for k in here]
        if carrier.head is not None:
            seen = [(c.sample, c.score) for c in (*sampled, *made) if c is not None]
            carrier.head.learn(carrier.model, io, g.prompt.visit_id, [((s.context_ids, s.token_ids), y) for s, y in seen], value)
        found.append((g, sampled, made))
    return found


def _sample(origin: Sample, moved: lm.Moved, text: str, verdict: Verdict) -> Sample:
    """The transported text under its prompt's context: no engine sampled it, so it has no behavior_logp."""
    bare = replace(origin.recontext(origin.context_ids), streams={})
    return replace(
        bare, id=f"{origin.id}/moved", token_ids=moved.token_ids, text=text, role="transported", verdict=verdict, reward=verdict.score, parent=origin.id,
        weights={"policy": 0.0},
    )  # fmt: skip
