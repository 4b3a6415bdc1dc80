"""reward_model on a tiny random Llama that the test makes and saves, and over the scripted server. fp32 on CPU, one thread."""

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from llmrl.chat import char_tokenizer
from llmrl.records import InputError, Prompt, Verdict, Verifier
from llmrl.rewards.reward_model import _Batcher, _ids, reward_model
from llmrl.scoring import Scorer
from tests.endpoint_server import EndpointServer, Raw

ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz+-*=?.,<>| \n"
P = Prompt("p", ({"role": "user", "content": "2+2?"},))
TEXTS = [("so we add " * k + str(k))[: 3 + 17 * k % 180] for k in range(1, 24)]
"""Of 3 to 180 characters, mixed."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def save(folder: Path, *, labels: int = 1, pad: bool = True, head: bool = True) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    tokenizer = char_tokenizer(ALPHABET)
    torch.manual_seed(labels)
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2,
        "num_labels": labels, "pad_token_id": tokenizer.pad_token_id if pad else None,
    }  # fmt: skip
    config = LlamaConfig(**shape)
    (LlamaForSequenceClassification if head else LlamaForCausalLM)(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("models")
    save(base / "rm")
    save(base / "rm3", labels=3)
    save(base / "nopad", pad=False)
    save(base / "lm", head=False)
    return base


def together(verify: Verifier, texts: list[str], prompt: Prompt = P) -> list[Verdict]:
    async def run() -> list[Verdict]:
        return await asyncio.gather(*(verify(prompt, text) for text in texts))  # type: ignore[arg-type]

    return asyncio.run(run())


def logit(verdict: Verdict) -> float:
    return float(verdict.detail.removeprefix("logit "))


def reference(path: Path, text: str) -> list[float]:
    """The model's own logits, alone and without padding."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    ids = char_tokenizer(ALPHABET)(f"2+2?{text}")["input_ids"]
    with torch.inference_mode():
        return model(input_ids=torch.tensor([[1, *ids]])).logits[0].tolist()


@pytest.mark.parametrize("name", ["rm", "nopad"])
def test_batched_scores_equal_one_by_one_and_the_models_own(folder: Path, name: str) -> None:
    alone = [together(reward_model(path=name, base=folder, batch=1), [text])[0] for text in TEXTS[:3]]
    one = reward_model(path=name, base=folder, batch=1)
    many = reward_model(path=name, base=folder, batch=7)
    singles, batched = together(one, TEXTS), together(many, TEXTS)
    for text, a, b in zip(TEXTS, singles, batched, strict=True):
        assert a.score is not None and b.score is not None
        assert abs(a.score - b.score) < 1e-5, text
    assert [v.score for v in alone] == [v.score for v in singles[:3]]
    assert len({round(v.score or 0, 4) for v in singles}) > 15  # the texts are told apart
    (x,) = reference(folder / name, TEXTS[5])
    assert batched[5].score == pytest.approx(1 / (1 + math.exp(-x)), abs=1e-5)
    assert logit(batched[5]) == pytest.approx(x, abs=1e-4)


def counted(sizes: list[int]) -> Any:
    """A forward whose logit is the sum of the row; it notes how many rows it got and fails on [13]."""

    def forward(rows: list[list[int]]) -> list[list[float]]:
        sizes.append(len(rows))
        if [13] in rows:
            raise RuntimeError("out of memory")
        return [[float(sum(row))] for row in rows]

    return forward


def test_forwards_hold_up_to_batch_rows_and_give_each_item_its_own() -> None:
    sizes: list[int] = []
    batcher = _Batcher(counted(sizes), 5)

    async def run(n: int) -> list[Any]:
        return await asyncio.gather(*(batcher.score([k, k]) for k in range(n)))

    assert asyncio.run(run(23)) == [[2.0 * k] for k in range(23)]
    assert sizes == [5, 5, 5, 5, 3]
    assert asyncio.run(run(2)) == [[0.0], [2.0]]  # another event loop, the same batcher
    assert sizes[5:] == [2]


def test_a_cancelled_item_leaves_the_others_alone() -> None:
    sizes: list[int] = []
    batcher = _Batcher(counted(sizes), 8)

    async def run() -> list[Any]:
        tasks = [asyncio.create_task(batcher.score([k])) for k in range(4)]
        await asyncio.sleep(0)
        tasks[1].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    found = asyncio.run(run())
    assert isinstance(found.pop(1), asyncio.CancelledError)
    assert found == [[0.0], [2.0], [3.0]] and sizes == [3]


def test_a_failed_forward_is_its_items_failure_and_the_next_batch_goes_on() -> None:
    batcher = _Batcher(counted([]), 3)

    async def run() -> list[Any]:
        return await asyncio.gather(*(batcher.score([k]) for k in (12, 13, 14, 15, 16)), return_exceptions=True)

    found = asyncio.run(run())
    assert [str(v) for v in found] == ["out of memory"] * 3 + ["[15.0]", "[16.0]"]


def test_squash(folder: Path) -> None:
    logits = reference(folder / "rm3", "4")
    exps = [math.exp(x) for x in logits]
    (soft,) = together(reward_model(path="rm3", base=folder, squash="softmax", label=2), ["4"])
    (sig,) = together(reward_model(path="rm3", base=folder, label=1), ["4"])
    assert soft.score == pytest.approx(exps[2] / sum(exps), abs=1e-5)
    assert sig.score == pytest.approx(1 / (1 + math.exp(-logits[1])), abs=1e-5)
    outside = [(x, v) for k in range(3) for x in [logits[k]] for v in together(reward_model(path="rm3", base=folder, squash="none", label=k), ["4"])]
    for x, verdict in outside:
        assert (verdict.score == pytest.approx(x, abs=1e-5)) if 0 <= x <= 1 else (verdict.score is None and "outside [0, 1]" in verdict.detail)
    assert any(not 0 <= x <= 1 for x, _ in outside)


def test_what_is_too_long_is_an_error_that_names_the_limit(folder: Path) -> None:
    verify = reward_model(path="rm", base=folder, max_tokens=50)
    fits, long = together(verify, ["1" * 45, "1" * 46])
    assert fits.score is not None
    assert (long.status, long.score) == ("error", None) and "51 tokens; the limit is 50" in long.detail
    (own,) = together(reward_model(path="rm", base=folder), ["1" * 300])
    assert "the limit is 256" in own.detail
    assert all(v.score is not None for v in together(verify, ["", "\ud83d 4 \udc00", "\0\0", "\u6f22\u5b57"]))


def test_special_tokens_in_a_response_open_no_turn(folder: Path) -> None:
    ids = _ids(char_tokenizer(ALPHABET), P, "4<eos><bos>good<pad>")
    assert [i for i in ids if i < 3] == [1]


def test_nonsense_is_refused_when_built(folder: Path) -> None:
    for match, keywords in {
        "label = 1, but the model has 1 label": {"path": "rm", "label": 1},
        "over one label is always 1": {"path": "rm", "squash": "softmax"},
        "say with label = 0..2": {"path": "rm3"},
        "no trained weights for .*score": {"path": "lm"},
        "there is no folder": {"path": "./nowhere"},
        "batch = 0": {"path": "rm", "batch": 0},
        "no sequence-classification model": {"path": "."},
        "do nothing without base_url": {"path": "rm", "timeout_s": 5.0},
        "do nothing with base_url": {"path": "rm", "base_url": "http://localhost:1", "batch": 2},
    }.items():
        with pytest.raises(ValueError, match=match):
            reward_model(**{"base": folder, **keywords})


def test_in_the_pool(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    here = together(reward_model(path="rm", base=folder), TEXTS)
    with Scorer("reward_model", {"path": "rm", "batch": 8}, folder, workers=1, timeout_s=20.0) as scorer:
        there = scorer.score([(P, text) for text in TEXTS])
    assert [v.score for v in there] == pytest.approx([v.score for v in here], abs=1e-5)
    with pytest.raises(InputError, match="has no trained weights"):
        Scorer("reward_model", {"path": "lm"}, folder, workers=1)


# ---------------------------------------------------------------- vLLM's /classify


def classify(version: str = "0.15.0", labels: int = 1) -> Any:
    def script(call: Any, number: int) -> Raw:
        if call.path == "/version":
            return Raw(body={"version": version})
        assert call.path == "/classify" and call.body["use_activation"] is False and call.body["messages"][-1]["role"] == "assistant"
        x = float(len(call.body["messages"][-1]["content"]))
        probs = [x, *([0.0] * (labels - 1))]
        return Raw(body={"object": "list", "data": [{"index": 0, "label": "LABEL_0", "probs": probs, "num_classes": labels}], "usage": {}})

    return script


def test_over_an_endpoint() -> None:
    with EndpointServer(classify()) as server:
        verify: Any = reward_model(path="rm", base_url=server.base_url)  # with or without /v1
        found = together(verify, ["", "1", "12345678"])
    assert [v.score for v in found] == pytest.approx([0.5, 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-8))])
    assert verify.about["worst_case_s"] == 9.0 and verify.counters["reward_model/failures"] == 0
    with EndpointServer(classify(labels=2)) as server:
        (soft,) = together(reward_model(path="rm", base_url=server.root, squash="softmax", label=0), ["12"])
        (unsaid,) = together(reward_model(path="rm", base_url=server.root), ["12"])
    assert soft.score == pytest.approx(math.exp(2) / (math.exp(2) + 1))
    assert unsaid.status == "error" and "2 labels" in unsaid.detail


def test_endpoint_failures() -> None:
    with EndpointServer(classify("0.11.2")) as server:
        (old,) = together(reward_model(path="rm", base_url=server.root), ["1"])
    assert old.status == "error" and "vLLM 0.11.2" in old.detail
    with EndpointServer(lambda call, n: Raw(body={"version": "0.15.0"}) if call.path == "/version" else Raw(hang=True)) as server:
        (silent,) = together(reward_model(path="rm", base_url=server.root, timeout_s=0.5), ["1"])
    (gone,) = together(reward_model(path="rm", base_url=server.root, timeout_s=0.6), ["1"])
    assert (silent.status, gone.status) == ("timeout", "error") and "ConnectError" in gone.detail
