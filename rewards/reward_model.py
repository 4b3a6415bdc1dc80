"""A sequence-classification model as the verifier: in the worker's own process, or served by vLLM."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from llmrl.records import Prompt, Verdict, Verifier
from llmrl.rewards.endpoint import Endpoint, EndpointError, EndpointTimeout
from llmrl.rewards.judge import defuse

Squash = Literal["sigmoid", "softmax", "none"]
_GATHER_S = 0.004
"""How long the first item of a batch waits for others: long against the hand-over of an item, short against a forward."""
_VLLM = (0, 13)
"""The first vLLM whose /classify is known to take `messages` together with `use_activation`."""


def reward_model(
    *, path: str, squash: Squash = "sigmoid", label: int | None = None, batch: int = 16, max_tokens: int = 4096,
    device: str = "auto", dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto", base_url: str | None = None,
    api_key_env: str | None = None, timeout_s: float = 9.0, base: Path = Path("."),
) -> Verifier:  # fmt: skip
    """The score that a reward model gives the conversation that ends in the response.

    squash: with x the model's logits and l the label: "sigmoid" 1 / (1 + exp(-x_l)); "softmax" exp(x_l) / sum(exp(x)); "none" x_l as it
    is, where the model was trained to say numbers in [0, 1].
    path: a folder beside the recipe (`base`) or a hub name, for transformers' AutoModelForSequenceClassification; with base_url the name
    under which the model is served. Never runs code from the folder (trust_remote_code is off).
    label: index of the logit; may be left out where there is one. batch: responses in one forward at most.
    max_tokens: longest conversation, in tokens; the model's own limit holds too. A longer one is an error, it is never cut.
    device: "auto" is cuda:LOCAL_RANK where there is CUDA, else cpu. dtype: "auto" is the checkpoint's.
    The text is the tokenizer's chat template of the messages and the response, or without a template the contents joined by newlines.
    Marks of chat templates and special tokens inside the response are broken up, so that it cannot open a turn of its own.
    Coroutines that wait together are put into one forward, padded on the right; what a response scores does not depend on its neighbours
    beyond rounding. The logit is read at the last token that is no padding token, as in transformers.

    base_url: a vLLM (0.13 or newer) that serves the model with `--runner pooling`, e.g. "http://localhost:8000". Asked with POST
    /classify {"model", "messages", "use_activation": false}; `probs` of the answer are then the logits. Its own chat template and length
    limit hold, and batch, max_tokens, device and dtype do nothing. api_key_env, timeout_s: see llmrl.rewards.endpoint.Endpoint.

    Status: error where the conversation is too long, where "none" meets a number outside [0, 1], where a logit is NaN, or where the
    endpoint is down or too old; timeout where it is silent. Needs no gold.
    Failure modes: a reward model is a proxy that training runs away from; watch length and repetition. A sigmoid is flat beyond logits of
    +-8 or so, where responses can no longer be told apart. In bfloat16 a score depends on the batch it came in, by up to about 1e-2.
    CUDA reserves far more address space than memory, also after the model is loaded: give its workers memory_mb = 0.
    """
    if batch < 1 or max_tokens < 1 or (label is not None and label < 0):
        raise ValueError(f"batch = {batch}, max_tokens = {max_tokens}, label = {label}; expected at least 1, 1 and 0")
    if base_url is not None:
        if (batch, max_tokens, device, dtype) != (16, 4096, "auto", "auto"):
            raise ValueError("batch, max_tokens, device and dtype do nothing with base_url; they are options of the server")
        return _served(Endpoint(base_url=re.sub(r"/v1/?$", "", base_url), model=path, api_key_env=api_key_env, timeout_s=timeout_s,
                                name="reward_model"), squash, label)  # fmt: skip
    if api_key_env is not None or timeout_s != 9.0:
        raise ValueError("api_key_env and timeout_s do nothing without base_url")
    model, tokenizer, where = _load(path, base, device, dtype)
    labels = int(model.config.num_labels)
    problem = _label_problem(labels, squash, label)
    if problem:
        raise ValueError(problem)
    own_limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limit = min(max_tokens, own_limit) if isinstance(own_limit, int) and own_limit > 0 else max_tokens
    batcher = _Batcher(lambda rows: _forward(model, rows), batch)

    async def verify(prompt: Prompt, response: str) -> Verdict:
        ids = _ids(tokenizer, prompt, response)
        if len(ids) > limit or not ids:
            told = f"the conversation has {len(ids)} tokens; the limit is {limit} (max_tokens or the model's own)"
            return Verdict(None, "error", detail=told)
        return _verdict(await batcher.score(ids), squash, label)

    about = {"reward_model": path, "device": where, "dtype": str(model.dtype), "labels": labels, "max_tokens": limit}
    verify.about = about  # type: ignore[attr-defined]
    return verify


def _label_problem(labels: int, squash: Squash, label: int | None) -> str | None:
    if label is None and labels > 1:
        return f"the model has {labels} labels; say with label = 0..{labels - 1} which one is good"
    if label is not None and label >= labels:
        return f"label = {label}, but the model has {labels} label{'s' if labels > 1 else ''}, counted from 0"
    if squash == "softmax" and labels == 1:
        return 'squash = "softmax" over one label is always 1; use "sigmoid"'
    return None


def _said(response: str) -> str:
    """The response without marks that open a turn; half a surrogate pair, which no tokenizer takes, becomes a question mark."""
    return defuse(response.encode("utf-8", "replace").decode())


def _verdict(logits: Sequence[float], squash: Squash, label: int | None) -> Verdict:
    x = logits[label or 0]
    if not all(map(math.isfinite, logits)):
        return Verdict(None, "error", detail=f"the model gives {x}")
    if squash == "none":
        if not 0.0 <= x <= 1.0:
            return Verdict(None, "error", detail=f'the model gives {x:g}, outside [0, 1]; squash = "sigmoid" maps any number')
        return Verdict(x, "ok", detail=f"{x:.6g}")
    if squash == "sigmoid":
        score = 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))  # exp of a large number overflows
    else:
        top = max(logits)
        score = math.exp(x - top) / sum(math.exp(y - top) for y in logits)
    return Verdict(min(1.0, score), "ok", detail=f"logit {x:.6g}")


# ---------------------------------------------------------------- in this process


def _load(path: str, base: Path, device: str, dtype: str) -> tuple[Any, Any, str]:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    local = base / Path(path).expanduser()
    if not local.is_dir() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise ValueError(f"path = {path!r}: there is no folder {local}; expected a transformers folder beside the recipe, or a hub name")
    name = str(local) if local.is_dir() else path
    if device == "auto":
        # a rank that sees only its own card has a local rank beyond the number of cards that it sees
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model, told = AutoModelForSequenceClassification.from_pretrained(
            name, trust_remote_code=False, dtype=dtype if dtype == "auto" else getattr(torch, dtype), output_loading_info=True
        )
        model = model.to(torch.device(device)).eval()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"path = {path!r}: no sequence-classification model and tokenizer could be loaded: {str(error)[:500]}") from error
    if told["missing_keys"]:  # transformers fills a missing head with random numbers: a reward out of nothing
        raise ValueError(f"path = {path!r} has no trained weights for {sorted(told['missing_keys'])[:5]}; it is no sequence-classification model")
    return model, tokenizer, device


def _ids(tokenizer: Any, prompt: Prompt, response: str) -> list[int]:
    """Token ids of the conversation that ends in `response`."""
    special = {*tokenizer.all_special_tokens, *(t.content for t in getattr(tokenizer, "added_tokens_decoder", {}).values() if t.special)}
    for token in sorted(special, key=len, reverse=True):
        if len(token) > 1:
            response = response.replace(token, f"{token[0]} {token[1:]}")
    said = _said(response)
    if tokenizer.chat_template:
        messages = [*(dict(m) for m in prompt.messages), {"role": "assistant", "content": said}]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return list(tokenizer("\n".join([*(m["content"] for m in prompt.messages), said]))["input_ids"])


def _forward(model: Any, rows: list[list[int]]) -> list[list[float]]:
    """Logits of each row, [rows, labels]."""
    import torch

    config = model.config.get_text_config()
    own = config.pad_token_id
    # transformers reads the logit at the last token that is not config.pad_token_id. A model without one takes the very last token when
    # it is alone; an id that no row holds gives the same in a batch. Attention is masked, so which id it is does not matter otherwise.
    used = set().union(*rows)
    pad = own if own is not None else next(i for i in range(config.vocab_size) if i not in used)
    longest = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=model.device)
    config.pad_token_id = pad
    try:
        with torch.inference_mode():
            return model(input_ids=ids, attention_mask=mask).logits.float().cpu().tolist()
    finally:
        config.pad_token_id = own


class _Batcher:
    """Gathers what coroutines ask for into batches, and runs those one after the other in a thread, so that the loop goes on."""

    def __init__(self, forward: Callable[[list[list[int]]], list[list[float]]], batch: int) -> None:
        self._forward, self._batch = forward, batch
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="llmrl-reward-model")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: list[tuple[list[int], asyncio.Future[list[float]]]] = []
        self._runner: asyncio.Task[None] | None = None
        self._full = asyncio.Event()

    async def score(self, ids: list[int]) -> list[float]:
        loop = asyncio.get_running_loop()
        if self._loop is not loop:  # what an ended loop left behind belongs to nobody
            self._loop, self._waiting, self._runner, self._full = loop, [], None, asyncio.Event()
        future: asyncio.Future[list[float]] = loop.create_future()
        self._waiting.append((ids, future))
        if len(self._waiting) >= self._batch:
            self._full.set()
        if self._runner is None or self._runner.done():
            self._runner = loop.create_task(self._run())
        return await future

    async def _run(self) -> None:
        while self._waiting:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._full.wait(), _GATHER_S)
            self._full.clear()
            self._waiting = [(ids, future) for ids, future in self._waiting if not future.done()]  # done: its item was cancelled
            taken, self._waiting = self._waiting[: self._batch], self._waiting[self._batch :]
            if len(self._waiting) >= self._batch:
                self._full.set()
            if not taken:
                continue
            try:
                found = await asyncio.get_running_loop().run_in_executor(self._thread, self._forward, [ids for ids, _ in taken])
            except Exception as error:  # out of memory, an id beyond the vocabulary: these items' failure, not the loop's
                for _, future in taken:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), logits in zip(taken, found, strict=True):
                if not future.done():
                    future.set_result(logits)


# ---------------------------------------------------------------- behind an endpoint


def _served(endpoint: Endpoint, squash: Squash, label: int | None) -> Verifier:
    checked: list[str] = []

    async def verify(prompt: Prompt, response: str) -> Verdict:
        messages = [*(dict(m) for m in prompt.messages), {"role": "assistant", "content": _said(response)}]
        try:
            async with asyncio.timeout(endpoint.timeout_s):  # one budget for both
                if not checked:
                    checked.append(_vllm_version(await endpoint.call("/version")))
                answer = await endpoint.call("/classify", {"model": endpoint.model, "messages": messages, "use_activation": False})
            logits = _logits(answer)
            problem = _label_problem(len(logits), squash, label)
        except (EndpointTimeout, TimeoutError):
            return Verdict(None, "timeout", detail=f"no reply from {endpoint.base_url} within timeout_s = {endpoint.timeout_s:g} s")
        except EndpointError as error:
            return Verdict(None, "error", detail=str(error))
        return Verdict(None, "error", detail=problem) if problem else _verdict(logits, squash, label)

    about = {"reward_model": endpoint.model, "base_url": endpoint.base_url, "worst_case_s": endpoint.worst_case_s}
    verify.about = about  # type: ignore[attr-defined]
    verify.counters = endpoint.counters  # type: ignore[attr-defined]
    return verify


def _vllm_version(answer: dict[str, Any]) -> str:
    """Older servers ignore `use_activation` without a word and answer probabilities where logits were asked for."""
    version = str(answer.get("version", ""))
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers and "dev" not in version and (int(numbers[1]), int(numbers[2])) < _VLLM:
        raise EndpointError(f"the server is vLLM {version}; /classify gives logits for a conversation from {_VLLM[0]}.{_VLLM[1]} on")
    if not numbers:
        raise EndpointError(f"/version answers {str(answer)[:200]}; expected a vLLM server")
    return version


def _logits(answer: dict[str, Any]) -> list[float]:
    try:
        (found,) = answer["data"]
        return [float(x) for x in found["probs"]][: found["num_classes"]]
    except (LookupError, TypeError, ValueError):
        raise EndpointError(f"/classify answers {str(answer)[:200]}; expected one item with `probs`") from None


reward_model.no_selfcheck = "a reward model's scores are its own: no row has one right score for every model"  # type: ignore[attr-defined]
reward_model.refuses_long = "over max_tokens"  # type: ignore[attr-defined]
