"""An engine over servers that are sampled from as they are: no weights are sent, and of the model only tokenizer and configuration are read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from llmrl.chat import Chat
from llmrl.models import Policy, _locate, _stop_ids, load_tokenizer, plain_folder
from llmrl.recipe import Model
from llmrl.records import InputError
from llmrl.vllm_client import Trouble
from llmrl.vllm_engine import VLLMEngine
from llmrl.weights import WeightFiles

_TEXT = "Q: What is 12 + 34?\nA: 46, said Zoë  (twice)."
"""Tokenised here and there, to see whether a server speaks the same ids."""


def tongue(model: str) -> Policy:
    """What the engine needs of a policy, without weights: tokenizer, end tokens, tokens that are never sampled. InputError as load_policy."""
    import torch
    from transformers import AutoConfig, GenerationConfig

    chat: Chat = load_tokenizer(Model(path=model), base=Path.cwd())
    folder = plain_folder(_locate(model, Path.cwd()))
    adapters = Path(folder) / "adapter_config.json"
    if adapters.is_file():
        folder = json.loads(adapters.read_text(encoding="utf-8"))["base_model_name_or_path"]
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as e:
        raise InputError(f"{model}: no model configuration could be read: {str(e).splitlines()[0]}") from e
    try:
        generation: Any = GenerationConfig.from_pretrained(folder)
    except OSError:
        generation = None
    bare: Any = SimpleNamespace(config=config, generation_config=generation, dtype=torch.float32, device=torch.device("cpu"))
    tokenizer = chat.tokenizer
    stop = _stop_ids(bare, tokenizer)
    never = {i for i in (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id) if i is not None} - stop
    return Policy(bare, chat, frozenset(stop), tuple(sorted(never)))


def connect(model: str, servers: Sequence[str], **how: Any) -> tuple[Policy, VLLMEngine, dict[str, str]]:
    """(what speaks the model's tokens, an engine over the servers, server address -> what it says it serves). how: of VLLMEngine.

    InputError where a server gives other token ids to a text than the model's tokenizer. A server may serve the model under another name or
    from another place: what it says is returned, and is for the user to judge.
    """
    policy = tongue(model)
    engine = VLLMEngine(policy, servers, WeightFiles(), trains=False, **how)
    try:
        mine = policy.chat.tokenizer.encode(_TEXT, add_special_tokens=False)
        for server, asked in engine.ask(lambda server: server.tokenized(_TEXT)).items():
            try:
                theirs = asked.result()
            except Trouble as trouble:
                raise InputError(f"--server: {trouble}") from None
            if theirs != mine:
                raise InputError(
                    f"{server.url} serves {server.root}, which gives other token ids than {model}: {theirs[:8]}... and {mine[:8]}... for the same text; "
                    "name the model that it serves"
                )
    except BaseException:
        engine.close()
        raise
    return policy, engine, {server.url: server.root for server in engine.servers}


def is_same(model: str, served: str) -> bool:
    """Whether what a server says it serves is this folder or Hub id."""
    where = plain_folder(_locate(model, Path.cwd()))
    return served in (model, where) or (Path(served).exists() and Path(where).exists() and Path(served).resolve() == Path(where).resolve())
