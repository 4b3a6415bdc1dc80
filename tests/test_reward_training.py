"""Reward-model training on the tiny model: Bradley-Terry by hand, the packed gradient against a padded forward, the saved folder, and that it learns."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from llmrl.batch import pack
from llmrl.cli import app
from llmrl.preference_pairs import Pair, read_pairs, split_pairs
from llmrl.recipe import Model, Optim, Tiny
from llmrl.records import InputError, Prompt
from llmrl.reward_head import PackedScore, reward_policy, save_reward_model, score_items, scored, template_with_end
from llmrl.reward_training import RewardTrainer, bradley_terry, calibration, load_reward_recipe, train_reward
from llmrl.rewards.reward_model import reward_model

TINY = Tiny(hidden=32, layers=2, heads=4, kv_heads=2, ffn=48, alphabet="abcdefgh>? ", max_length=64)
MODEL = Model(path="tiny", tiny=TINY)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def accelerator() -> Any:
    from accelerate import Accelerator

    return Accelerator(cpu=True)


def items(policy: Any, *rows: tuple[str, str]) -> list[tuple[list[int], list[int]]]:
    return [(policy.chat.prompt_ids([{"role": "user", "content": q}]), policy.chat.completion_ids(a)) for q, a in rows]


ROWS = (("ab>", "abab"), ("ab>", "c"), ("cd>", "dddd"), ("cd>", ""), ("cdeff>", "abcdefg"), ("cdeff>", "h"))


# ---------------------------------------------------------------- numbers


def test_bradley_terry_by_hand():
    """log(1 + e^-1) = 0.313262, log(1 + e^2) = 2.126928; centred: + 0.01 * 9 and + 0.01 * 4."""
    w, l = torch.tensor([2.0, -2.0], dtype=torch.float64), torch.tensor([1.0, 0.0], dtype=torch.float64)  # noqa: E741
    assert bradley_terry(w, l).tolist() == pytest.approx([0.31326168751822286, 2.1269280110429727], abs=1e-12)
    assert bradley_terry(w, l, 0.01).tolist() == pytest.approx([0.40326168751822286, 2.1669280110429727], abs=1e-12)


def test_calibration_by_hand():
    """Confidences 0.6 (right), 0.6 (wrong), 0.9 (right), 0.5 (a tie: half right). Bins of 0.1: [0.5, 0.6), [0.6, 0.7), [0.9, 1]."""
    logit = {p: math.log(p / (1 - p)) for p in (0.65, 0.95)}
    c = calibration([logit[0.65], -logit[0.65], logit[0.95], 0.0], bins=5)
    assert c.pairs == 4 and c.accuracy == pytest.approx(2.5 / 4)
    assert [(b["n"], round(b["accuracy"], 6), round(b["confidence"], 6)) for b in c.table] == [(1, 0.5, 0.5), (2, 0.5, 0.65), (1, 1.0, 0.95)]
    assert c.ece == pytest.approx((0 + 2 * 0.15 + 0.05) / 4)
    assert c.loss_nats == pytest.approx(-(math.log(0.65) + math.log(0.35) + math.log(0.95) + math.log(0.5)) / 4)
    assert c.low < c.accuracy < c.high


# ---------------------------------------------------------------- the model


def padded(policy: Any, rows: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    """The same scores by hand: one padded row an item, transformers' own attention, the hidden state at the last real token."""
    texts = [[*c, *t] for c, t in rows]
    longest = max(map(len, texts))
    ids = torch.tensor([t + [0] * (longest - len(t)) for t in texts])
    mask = torch.tensor([[1] * len(t) + [0] * (longest - len(t)) for t in texts])
    policy.model.set_attn_implementation("eager")
    try:
        hidden = policy.model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
    finally:
        policy.model.set_attn_implementation("llmrl")
    return torch.stack([policy.model.score.weight[0] @ hidden[i, len(t) - 1] for i, t in enumerate(texts)])


@pytest.mark.parametrize("tokens", [1, 24, 4096])
def test_packed_scores_and_gradient_are_those_of_a_padded_forward(tokens):
    policy = reward_policy(MODEL, seed=3)
    policy.model.double()
    rows = items(policy, *ROWS)
    w, l = padded(policy, rows)[::2], padded(policy, rows)[1::2]  # noqa: E741
    bradley_terry(w, l, 0.02).mean().backward()
    want = {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}
    assert "score.weight" in want and len(want) > 10
    policy.model.zero_grad(set_to_none=True)
    assert score_items(policy, rows, tokens=tokens) == pytest.approx(padded(policy, rows).tolist(), abs=1e-6)  # norms and rotary angles are fp32 in any model
    trainer = RewardTrainer(policy, accelerator(), tokens=tokens, center=0.02)
    trainer.learner.start(Optim(lr=1e-3))
    got: dict[str, torch.Tensor] = {}
    trainer.learner.held.update = lambda lr: got.update({n: p.grad.clone() for n, p in trainer.learner.params if p.grad is not None}) or 0.0
    row = trainer.update(list(zip(rows[::2], rows[1::2], strict=True)), 1e-3)
    assert set(got) == set(want)
    for name, grad in want.items():
        assert float((got[name] - grad).abs().max()) < 1e-6, name
    assert row["loss_nats"] == pytest.approx(float(bradley_terry(w, l).mean().detach()), abs=1e-6)


def test_the_score_is_read_at_the_end_token_and_depends_on_nothing_behind_it():
    policy = reward_policy(MODEL, seed=3)
    (item,) = items(policy, ("ab>", "abc"))
    assert item[1][-1] == policy.chat.tokenizer.eos_token_id
    one, two = scored("a", item), scored("b", item)
    two.token_ids[-1] = 7  # the token that packing does not read
    values = [float(PackedScore(policy)(pack([s], [torch.zeros(5)], tokens=99)[0])[0].detach()) for s in (one, two)]
    assert len(one.token_ids) == 5 and values[0] == values[1]
    assert score_items(policy, [(item[0], item[1][:-1])])[0] != values[0]


def test_the_saved_folder_gives_the_same_scores(tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    policy = reward_policy(MODEL, seed=5)
    rows = items(policy, *ROWS)
    want = score_items(policy, rows)
    save_reward_model(policy, tmp_path / "rm")
    model, told = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm", output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "rm")
    assert not told["missing_keys"] and not told["unexpected_keys"] and model.config.num_labels == 1
    texts = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in ROWS]
    batch = tokenizer([tokenizer.apply_chat_template(t, tokenize=False) for t in texts], add_special_tokens=False, padding=True, return_tensors="pt")
    with torch.no_grad():
        got = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0].tolist()
    assert got == pytest.approx(want, abs=2e-6)
    verify: Any = reward_model(path=str(tmp_path / "rm"))
    import asyncio

    async def all_of() -> list[Any]:
        return await asyncio.gather(*(verify(Prompt(q, ({"role": "user", "content": q},)), a) for q, a in ROWS))

    scores = [v.score for v in asyncio.run(all_of())]
    assert scores == pytest.approx([1 / (1 + math.exp(-x)) for x in want], abs=2e-6)


@pytest.mark.parametrize(
    "template, want",
    [
        (None, "<bos>a\nb\nc<eos>"),
        ("{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}", "<bos>abc<eos>"),
        ("{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}\n{% endfor %}", "<system>a<eos>\n<user>b<eos>\n<assistant>c<eos>"),
    ],
)
def test_every_template_ends_with_the_end_token_once(template, want):
    from llmrl.chat import char_tokenizer

    tokenizer = char_tokenizer("abc")
    tokenizer.chat_template = template
    messages = [{"role": r, "content": c} for r, c in (("system", "a"), ("user", "b"), ("assistant", "c"))]
    made = template_with_end(tokenizer)
    want = want.replace("b\nc", "bc") if template is None else want  # the reply stands right behind the prompt, as Chat has it
    assert tokenizer.apply_chat_template(messages, chat_template=made, tokenize=False) == want
    asked = tokenizer.apply_chat_template(messages[:2], chat_template=made, tokenize=False)
    assert asked == ("<bos>a\nb" if template is None else tokenizer.apply_chat_template(messages[:2], tokenize=False))


# ---------------------------------------------------------------- pairs


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def test_the_forms_of_a_row(tmp_path):
    turn = {"role": "user", "content": "hi"}
    rows = [
        {"prompt": "p", "chosen": " x", "rejected": " y"},
        {"messages": [turn], "chosen": "x", "rejected": "y"},
        {"prompt": [turn], "chosen": [{"role": "assistant", "content": "x"}], "rejected": "y"},
        {"chosen": [turn, {"role": "assistant", "content": "x"}], "rejected": [turn, {"role": "assistant", "content": "y"}]},
        {"chosen": "\n\nHuman: a b\n\nAssistant: c\n\nHuman: d\n\nAssistant: x", "rejected": "\n\nHuman: a b\n\nAssistant: c\n\nHuman: d\n\nAssistant: y"},
    ]
    pairs = read_pairs(str(write(tmp_path / "p.jsonl", rows))).pairs
    assert [p.chosen for p in pairs] == [" x", "x", "x", "x", "x"] and [p.rejected for p in pairs] == [" y", "y", "y", "y", "y"]
    assert pairs[0].messages == ({"role": "user", "content": "p"},) and all(p.messages == (turn,) for p in pairs[1:4])
    assert [(m["role"], m["content"]) for m in pairs[4].messages] == [("user", "a b"), ("assistant", "c"), ("user", "d")]
    assert pairs[2].id == f"{tmp_path / 'p.jsonl'}:3"


def test_bad_rows_are_named_by_line(tmp_path):
    rows: list[Any] = [
        {"prompt": "p", "chosen": "x", "rejected": "y"}, {"prompt": "p", "chosen": "x"}, "{no json", {"prompt": "p", "chosen": "x", "rejected": "x"},
        {"prompt": "", "chosen": "x", "rejected": "y"}, {"chosen": "x", "rejected": "y"}, {"prompt": 3, "chosen": "x", "rejected": "y"},
    ]  # fmt: skip
    file = write(tmp_path / "p.jsonl", rows)
    with pytest.raises(InputError) as told:
        read_pairs(str(file))
    text = str(told.value)
    assert "6 of 7 rows are no preference pairs" in text and "and 1 more" in text and "pairs.on_bad" in text
    assert f"{file}:2: it has no rejected" in text and f"{file}:3: not JSON" in text and f"{file}:4: chosen and rejected are the same text" in text
    kept = read_pairs(str(file), on_bad="drop")
    assert len(kept.pairs) == 1 and [w for w, _ in kept.dropped] == [f"{file}:{n}" for n in range(2, 8)]


def trace(i: int, prompt: str, response: str, score: float | None) -> dict[str, Any]:
    status = "ok" if score is not None else None
    return {"schema": 2, "id": f"{prompt}/{i}", "prompt_id": prompt, "prompt": prompt, "response": response, "score": score, "status": status}


def test_judged_samples_become_pairs(tmp_path):
    own = [trace(i, "p", text, score) for i, (text, score) in enumerate([("a", 1.0), ("b", 0.0), ("c", 0.7), ("a", 1.0), ("d", None)])]
    rows = [*own, trace(0, "q", "e", 1.0)]
    file = str(write(tmp_path / "t.jsonl", rows))
    found = {(p.chosen, p.rejected) for p in read_pairs(file).pairs}
    assert found == {("a", "b"), ("c", "b")}  # a > b once though it was sampled twice; a and c are too close; d is not judged; q has one alone
    assert {(p.chosen, p.rejected) for p in read_pairs(file, gap=0.2).pairs} == {("a", "b"), ("c", "b"), ("a", "c")}
    assert len(read_pairs(file, gap=0.2, per_prompt=1).pairs) == 1
    with pytest.raises(InputError, match="no two samples of a prompt are 1 apart"):
        read_pairs(str(write(tmp_path / "u.jsonl", rows[2:])), gap=1.0)


def test_no_prompt_is_on_both_sides():
    pairs = [Pair(str(i), ({"role": "user", "content": str(i // 3)},), "x", "y") for i in range(30)]
    train, held = split_pairs(pairs, 7, 0)
    assert len(held) == 9 and len(train) == 21 and not {p.prompt_key for p in train} & {p.prompt_key for p in held}
    with pytest.raises(InputError, match="holdout"):
        split_pairs(pairs, 30, 0)


# ---------------------------------------------------------------- the command


def preference(tmp_path: Path, n: int = 400) -> Path:
    """More "a" is better."""
    rng, rows = random.Random(0), []
    while len(rows) < n:
        a, b = ("".join(rng.choices("abcd", k=rng.randint(3, 8))) for _ in "ab")
        if a.count("a") > b.count("a"):
            rows.append({"prompt": rng.choice(["e>", "f>", "g>", "gh>", "hhe>"]) + "".join(rng.choices("efgh", k=3)), "chosen": a, "rejected": b})
    return write(tmp_path / "pairs.jsonl", rows)


def recipe(tmp_path: Path, **more: str) -> Path:
    text = f"""
epochs = 3
[run]
dir = "{tmp_path / "run"}"
[model]
path = "tiny"
[model.tiny]
hidden = 32
layers = 2
heads = 4
ffn = 48
alphabet = "abcdefgh>"
max_length = 64
[pairs]
path = "./pairs.jsonl"
holdout = 100
{more.get("pairs", "")}
[optim]
lr = 5e-3
[batch]
pairs = 16
{more.get("tail", "")}
"""
    file = tmp_path / "reward.toml"
    file.write_text(text)
    return file


def test_it_learns_a_simple_preference_and_reports_it(tmp_path):
    preference(tmp_path)
    done = CliRunner().invoke(app, ["reward", str(recipe(tmp_path)), "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["held_out"]["pairs"] >= 100 and told["held_out"]["accuracy"] > 0.9 > told["before"]["accuracy"]
    assert told["held_out"]["ece"] < 0.15 and sum(b["n"] for b in told["held_out"]["table"]) == told["held_out"]["pairs"]
    assert told["template_agrees"] == 1.0 and told["updates"] == 3 * math.ceil(told["train_pairs"] / 16)
    run = tmp_path / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == told["updates"] + 1 and rows[-1]["eval/accuracy"] == told["held_out"]["accuracy"]
    assert json.loads((run / "summary.json").read_text()) == told and (run / "reward_model" / "model.safetensors").is_file()
    again = CliRunner().invoke(app, ["reward", str(recipe(tmp_path)), "--json"])
    assert isinstance(again.exception, InputError) and "already holds a run" in str(again.exception)


def test_the_same_seed_gives_the_same_model(tmp_path):
    preference(tmp_path, 130)
    file = recipe(tmp_path)
    files = []
    for _ in range(2):
        train_reward(load_reward_recipe(file, ["epochs=1"]), overwrite=True)
        files.append((tmp_path / "run" / "reward_model" / "model.safetensors").read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize(
    "how, told",
    [
        ({"pairs": "holdot = 3"}, 'pairs.holdot: unknown key; nearest: "holdout"'), ({"tail": "[eval]\nbins = 0"}, "eval.bins"),
        ({"tail": "[model.lora]\nrank = 4"}, "model.lora: a reward model is trained whole"), ({"tail": "[verifier]\nuse = 'exact'"}, "verifier: unknown key"),
    ],
)  # fmt: skip
def test_a_recipe_is_refused_by_name(tmp_path, how, told):
    preference(tmp_path, 20)
    with pytest.raises(InputError) as error:
        load_reward_recipe(recipe(tmp_path, **how))
    assert told in str(error.value) and "reward.toml" in str(error.value)


def test_pairs_that_do_not_fit_are_named_before_training(tmp_path):
    rows = [{"prompt": p, "chosen": c, "rejected": "c"} for p, c in (("a", "b" * 80), ("a", "x"), ("ab", "b"))]
    write(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(InputError) as error:
        train_reward(load_reward_recipe(recipe(tmp_path), ["pairs.holdout=1"]))
    assert "pairs.jsonl:1: 83 tokens; the limit is 64" in str(error.value) and "pairs.jsonl:2: the tokenizer has no token for 'x'" in str(error.value)
    assert not (tmp_path / "run").exists()
