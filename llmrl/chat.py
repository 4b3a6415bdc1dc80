"""Messages to token ids and back. A completion's ids are the ids that were sampled: they are never decoded and tokenised again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmrl.records import InputError, Message


class Chat:
    """A tokenizer seen as a chat template."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids)

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation up to where the assistant begins to write.

        Without a chat template (a base model) the contents are joined by newlines, after the begin-of-text token if there is one.
        """
        tok = self.tokenizer
        if tok.chat_template:
            return list(tok.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=True, return_dict=False))
        ids = tok("\n".join(m["content"] for m in messages), add_special_tokens=False)["input_ids"]
        return ([tok.bos_token_id] if tok.bos_token_id is not None else []) + list(ids)

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
