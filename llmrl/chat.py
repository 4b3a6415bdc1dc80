"""Messages to token ids and back. A completion's ids are the ids that were sampled: they are never decoded and tokenised again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from llmrl.records import InputError, Message

_TURN = "(a turn)"
"""Stands for the assistant's text where only what the template puts behind it is wanted."""


def _told(tools: Sequence[dict[str, Any]]) -> str:
    """A description of tools in words, as Hermes models were taught them."""
    calls = '<tool_call>{"name": ..., "arguments": {...}}</tool_call>'
    return f"You may call these functions, by writing {calls}:\n" + "\n".join(json.dumps(tool) for tool in tools)


class Chat:
    """A tokenizer seen as a chat template."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids)

    def prompt_ids(self, messages: Sequence[Message], *, tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """Ids of a conversation up to where the assistant begins to write.

        tools: JSON schemas for the template; one that knows nothing of tools gets them as text in the system message.
        Without a chat template (a base model) the contents are joined by newlines, after the begin-of-text token if there is one.
        """
        tok = self.tokenizer
        if tok.chat_template:
            messages = list(messages)
            if tools and self._rendered(messages, tools) == self._rendered(messages, ()):
                first, rest = ([messages[0]["content"]], messages[1:]) if messages and messages[0]["role"] == "system" else ([], messages)
                messages = [{"role": "system", "content": "\n".join([*first, _told(tools)])}, *rest]
            more: dict[str, Any] = {"tools": list(tools)} if tools else {}
            return list(tok.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False, **more))
        ids = tok("\n".join(m["content"] for m in messages), add_special_tokens=False)["input_ids"]
        return ([tok.bos_token_id] if tok.bos_token_id is not None else []) + list(ids)

    def between_ids(self, messages: Sequence[Message], *, last_id: int, tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """Ids from the end of one turn of the assistant to the beginning of its next: the closing delimiter of the turn, unless `last_id`, the
        last token that the model wrote, is it; the messages; the opening of the next turn.

        Tokenised by itself, behind tokens that stay as they were sampled. A template that has no role "tool" gets such messages as "user". Texts of
        special tokens are taken out of the messages: they would forge a turn. InputError where the tokenizer has no token for a character.
        """
        clean = [{**m, "content": self._harmless(m["content"])} for m in messages]
        if strange := next((c for m in clean if (c := self.unknown(m["content"])) is not None), None):
            raise InputError(f"the environment said something for which the tokenizer has no token: {strange!r}; add it to model.tiny.alphabet")
        plain = "".join(f"\n{m['content']}" for m in clean)
        text = self._after_turn(clean, tools) if self.tokenizer.chat_template else plain
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return ids[1:] if ids and ids[0] == last_id and last_id in self._special else ids

    def _after_turn(self, messages: list[Message], tools: Sequence[dict[str, Any]]) -> str:
        """What the template puts behind the text of an assistant's turn that these messages follow."""
        asked = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _TURN}]
        for found in (messages, [{**m, "role": "user"} if m["role"] == "tool" else m for m in messages]):
            try:
                text = self._rendered([*asked, *found], tools)
            except Exception:  # whatever a template raises at a role that it does not know
                continue
            after = text.rpartition(_TURN)[2]
            if _TURN in text and all(m["content"].strip() in after for m in found):
                return after
        raise InputError(f"the chat template cannot render the roles {[m['role'] for m in messages]} behind a turn of the assistant; set model.chat_template")

    def _rendered(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> str:
        more: dict[str, Any] = {"tools": list(tools)} if tools else {}
        return self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False, **more)

    def _harmless(self, content: str) -> str:
        before = None
        while before != content:  # taking one out may put another together
            before = content
            for token in self.tokenizer.all_special_tokens:
                content = content.replace(token, "")
        return content

    def completion_ids(self, text: str) -> list[int]:
        """Ids of a demonstration, with the end token: what a supervised step learns to write after `prompt_ids`."""
        return [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]

    def text(self, token_ids: Sequence[int]) -> str:
        """Decoded text without special tokens, whitespace left as it is."""
        return self.tokenizer.decode([i for i in token_ids if i not in self._special], clean_up_tokenization_spaces=False)

    def show(self, token_ids: Sequence[int]) -> str:
        """Decoded text with special tokens, for people."""
        return self.tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False)

    def unknown(self, text: str) -> str | None:
        """The first character that the tokenizer cannot express, or None. Only tokenizers with an unknown token have such."""
        unk = self.tokenizer.unk_token_id
        if unk is None or unk not in self.tokenizer(text, add_special_tokens=False)["input_ids"]:
            return None
        return next((c for c in text if unk in self.tokenizer(c, add_special_tokens=False)["input_ids"]), text[:1])


def char_tokenizer(alphabet: str) -> Any:
    """One token a character, after <pad> <bos> <eos> <unk>; its chat template is the begin token and the bare contents."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if len(set(alphabet)) != len(alphabet) or not alphabet:
        raise InputError(f"model.tiny.alphabet: {alphabet!r} must name each character once")
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    vocab = {token: i for i, token in enumerate([*special, *alphabet])}
    tok = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")  # type: ignore[assignment]
    tok.decoder = decoders.Fuse()  # type: ignore[assignment]
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")
    fast.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return fast
