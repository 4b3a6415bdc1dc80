"""GRPO in one file: the readable oracle that llmrl's numbers are tested against. torch and transformers only; nothing of llmrl.

    python scripts/one_file_grpo.py            about 90 s on 2 cores; --help for the knobs

A character-level Llama of 0.6M parameters learns chains such as `3-6-1=`. Supervised warm start on demonstrations of which most skip the
steps and guess (`#-6`) and some are careful (`3-6=-3;-3-1=-4#-4`); then GRPO with the reward 1 for the right number after `#`.
Everything is done the plain way: batches padded on the right, whole logits, one log_softmax, masks from positions (never from token
ids), and PAD and BOS left out of the softmax both where tokens are sampled and where they are trained on.
"""

from __future__ import annotations

import argparse
import random
import time

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

PAD, BOS, EOS = 0, 1, 2
CHARS = "0123456789+-*=;#() "
FIRST = 4  # id of the first character; 3 is left free (<unk>)
Row = tuple[list[int], list[int]]  # prompt ids, completion ids


# ---------------------------------------------------------------- the task


def encode(text: str) -> list[int]:
    return [CHARS.index(c) + FIRST for c in text]


def decode(ids: list[int]) -> str:
    return "".join(CHARS[i - FIRST] for i in ids if i >= FIRST)


def problem(rng: random.Random) -> tuple[list[int], list[str]]:
    """Three numbers from 1 to 9 and the two signs between them."""
    return [rng.randint(1, 9) for _ in range(3)], [rng.choice("+-") for _ in range(2)]


def steps_of(numbers: list[int], signs: list[str]) -> list[tuple[int, str, int, int]]:
    """(running value, sign, number, new value) of each step."""
    steps, value = [], numbers[0]
    for sign, n in zip(signs, numbers[1:], strict=True):
        new = value + n if sign == "+" else value - n
        steps.append((value, sign, n, new))
        value = new
    return steps


def question(p: tuple[list[int], list[str]]) -> list[int]:
    """Ids of `3-6-1=`: always 7 of them, so that a batch of prompts needs no padding."""
    numbers, signs = p
    return [BOS, *encode(str(numbers[0]) + "".join(s + str(n) for s, n in zip(signs, numbers[1:], strict=True)) + "=")]


def answer(p: tuple[list[int], list[str]]) -> str:
    return str(steps_of(*p)[-1][3])


def demonstration(p: tuple[list[int], list[str]], rng: random.Random, guess: float) -> list[int]:
    """With probability `guess` a number near the answer and no steps, else all steps and the answer."""
    if rng.random() < guess:
        return [*encode(f"#{int(answer(p)) + rng.randint(-3, 3)}"), EOS]
    return [*encode(";".join(f"{v}{s}{n}={new}" for v, s, n, new in steps_of(*p)) + "#" + answer(p)), EOS]


def reward(p: tuple[list[int], list[str]], completion: list[int]) -> float:
    said = decode(completion).split("#")
    return float(completion[-1] == EOS and len(said) == 2 and said[1] == answer(p))


# ---------------------------------------------------------------- log-probs, loss, gradient


def token_logp(model: LlamaForCausalLM, rows: list[Row], pad_to: int = 0, banned: tuple[int, ...] = (PAD, BOS)) -> tuple[Tensor, Tensor]:
    """Log-prob of every completion token, [N, W - 1], and the 0/1 mask that says which entries are completion tokens."""
    width = max(pad_to, *(len(p) + len(c) for p, c in rows))
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros(len(rows), width, dtype=model.dtype)
    attend = torch.zeros(len(rows), width, dtype=torch.long)
    for i, (p, c) in enumerate(rows):
        ids[i, : len(p) + len(c)] = torch.tensor(p + c)
        attend[i, : len(p) + len(c)] = 1
        mask[i, len(p) : len(p) + len(c)] = 1
    logits = model(input_ids=ids, attention_mask=attend).logits[:, :-1]
    logits[..., list(banned)] = -torch.inf
    targets = ids[:, 1:].where(mask[:, 1:] > 0, EOS)  # where nothing counts: any id that is not banned
    return -F.cross_entropy(logits.transpose(1, 2), targets, reduction="none"), mask[:, 1:]


def policy_loss(logp: Tensor, old: Tensor, adv: Tensor, mask: Tensor, low: float, high: float, reduction: str, budget: int = 1) -> Tensor:
    """PPO-clip. reduction: "token" mean over all tokens, "sample" mean of row means, "fixed" sum / (rows * budget)."""
    ratio = (logp - old).exp()
    loss = -torch.min(ratio * adv[:, None], ratio.clamp(1 - low, 1 + high) * adv[:, None]) * mask
    if reduction == "token":
        return loss.sum() / mask.sum()
    if reduction == "sample":
        return (loss.sum(1) / mask.sum(1)).mean()
    if reduction == "fixed":
        return loss.sum() / (len(loss) * budget)
    raise ValueError(f"reduction {reduction!r}: token, sample or fixed")


def spread_out(values: list[list[float]], mask: Tensor) -> Tensor:
    """Ragged per-token numbers into the places of the mask, [N, W - 1]; 0 elsewhere."""
    return torch.zeros_like(mask).masked_scatter(mask > 0, torch.tensor([x for row in values for x in row], dtype=mask.dtype))


def loss_and_grads(
    model: LlamaForCausalLM, rows: list[Row], adv: list[float], old_logp: list[list[float]], low: float, high: float, reduction: str,
    *, budget: int = 1, pad_to: int = 0, banned: tuple[int, ...] = (PAD, BOS),
) -> tuple[float, dict[str, Tensor]]:  # fmt: skip
    """Loss of one batch, and its gradient by every parameter. Changes no weight."""
    model.zero_grad(set_to_none=True)
    logp, mask = token_logp(model, rows, pad_to, banned)
    loss = policy_loss(logp, spread_out(old_logp, mask), torch.tensor(adv, dtype=mask.dtype), mask, low, high, reduction, budget)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.item(), grads


# ---------------------------------------------------------------- sampling


@torch.no_grad()
def sample(
    model: LlamaForCausalLM, prompts: list[list[int]], temperature: float, max_new: int
) -> tuple[list[list[int]], list[list[float]]]:
    """Completions (with their EOS, where there is one) and the log-probs they were sampled with. Temperature 0 is greedy."""
    ids, cache = torch.tensor(prompts), None
    tokens: list[list[int]] = [[] for _ in prompts]
    logps: list[list[float]] = [[] for _ in prompts]
    for _ in range(max_new):
        out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, logits = out.past_key_values, out.logits[:, -1]
        logits[:, [PAD, BOS]] = -torch.inf
        logp = (logits / (temperature or 1.0)).log_softmax(-1)
        ids = logp.argmax(-1, keepdim=True) if temperature == 0 else torch.multinomial(logp.exp(), 1)
        for i, (token, value) in enumerate(zip(ids[:, 0].tolist(), logp.gather(1, ids)[:, 0].tolist(), strict=True)):
            if not tokens[i] or tokens[i][-1] != EOS:  # rows that have ended run along and are ignored
                tokens[i].append(token)
                logps[i].append(value)
        if all(t[-1] == EOS for t in tokens):
            break
    return tokens, logps


def accuracy(model: LlamaForCausalLM, problems: list[tuple[list[int], list[str]]], temperature: float, max_new: int) -> float:
    said, _ = sample(model, [question(p) for p in problems], temperature, max_new)
    return sum(reward(p, c) for p, c in zip(problems, said, strict=True)) / len(problems)


# ---------------------------------------------------------------- training


def advantages(rewards: list[float], group: int) -> list[float]:
    """(R - mean of the group) / (sample std of the group + 1e-6)."""
    r = torch.tensor(rewards).view(-1, group)
    return ((r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-6)).flatten().tolist()


def step_with(optimizer: torch.optim.Optimizer, model: LlamaForCausalLM, lr: float) -> None:
    for g in optimizer.param_groups:
        g["lr"] = lr
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def warm_start(model: LlamaForCausalLM, a: argparse.Namespace, rng: random.Random, report) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=a.sft_lr, betas=(0.9, 0.95), weight_decay=0.01)
    for step in range(a.sft_steps):
        problems = [problem(rng) for _ in range(a.sft_batch)]
        logp, mask = token_logp(model, [(question(p), demonstration(p, rng, a.guess)) for p in problems])
        (-(logp * mask).sum() / mask.sum()).backward()
        step_with(optimizer, model, a.sft_lr * min(1.0, (step + 1) / 20) * (1 - 0.9 * step / a.sft_steps))
        if (step + 1) % max(1, a.sft_steps // 4) == 0:
            report("sft", step + 1)


def grpo(model: LlamaForCausalLM, a: argparse.Namespace, rng: random.Random, report) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=a.lr, betas=(0.9, 0.99), weight_decay=0.0)
    for step in range(a.steps):
        problems = [p for p in (problem(rng) for _ in range(a.prompts)) for _ in range(a.group)]
        completions, old = sample(model, [question(p) for p in problems], 1.0, a.max_new)
        rewards = [reward(p, c) for p, c in zip(problems, completions, strict=True)]
        adv = advantages(rewards, a.group)
        live = [i for i, x in enumerate(adv) if x != 0]  # the others have no gradient
        if live:
            logp, mask = token_logp(model, [(question(problems[i]), completions[i]) for i in live])
            old_logp = spread_out([old[i] for i in live], mask)
            gap = ((logp - old_logp).detach() * mask).abs().max().item()
            assert gap < 1e-3, f"sampling and training disagree by {gap} nats about the very same tokens"
            adv_live = torch.tensor([adv[i] for i in live])
            policy_loss(logp, old_logp, adv_live, mask, a.low, a.high, "token").backward()
            step_with(optimizer, model, a.lr * min(1.0, (step + 1) / 5) * (1 - 0.95 * step / a.steps))
        if (step + 1) % a.every == 0:
            report("grpo", step + 1, f"train reward {sum(rewards) / len(rewards):.3f}")


def main() -> None:
    ap = argparse.ArgumentParser(description="GRPO in one file, on a tiny model and a tiny task.")
    knobs = {"sft-steps": 400, "sft-batch": 128, "steps": 60, "prompts": 32, "group": 8, "max-new": 24, "every": 10, "seed": 0, "eval": 200}
    for name, default in {**knobs, "sft-lr": 2e-3, "lr": 1e-4, "guess": 0.6, "low": 0.2, "high": 0.28}.items():
        ap.add_argument(f"--{name}", type=type(default), default=default)
    a = ap.parse_args()
    torch.manual_seed(a.seed)
    rng, began = random.Random(a.seed), time.time()
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=FIRST + len(CHARS), hidden_size=128, intermediate_size=336, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=256, tie_word_embeddings=False, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
    ))  # fmt: skip
    held_out = [problem(random.Random(10**6 + i)) for i in range(a.eval)]

    def report(phase: str, step: int, more: str = "") -> None:
        greedy, sampled = (accuracy(model, held_out, t, a.max_new) for t in (0.0, 1.0))
        print(f"{phase:>4} {step:4d}  {time.time() - began:5.1f} s  greedy {greedy:.3f}  sampled {sampled:.3f}  {more}", flush=True)

    warm_start(model, a, rng, report)
    grpo(model, a, rng, report)
    said, _ = sample(model, [question(p) for p in held_out[:3]], 0.0, a.max_new)
    for p, c in zip(held_out, said, strict=False):
        print(f"{decode(question(p))} {decode(c)}   wanted {answer(p)}")


if __name__ == "__main__":
    main()
