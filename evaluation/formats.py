"""What other programs write about a response, as fields of a trace. One function a format: (row, Source) -> drafts, one a response.

A draft is a dict of `Trace` fields; `raw` beside them says whether its logprobs are those of the bare softmax (True), of the distribution
that was sampled from (False), or that the row does not tell (None). extra["context"] is the whole text that the model was given, where it was
no chat. What a row does not hold is left out: `importers` completes drafts and counts what is missing. Each raises ValueError saying why a row
holds no response. The formats were read off the programs' sources: lm-eval 0.4.13, lighteval 0.8.1 and 0.13.0, vLLM 0.32, and the OpenAI chat
completion and batch schemas.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Draft = dict[str, Any]


@dataclass
class Source:
    """Where rows come from, and what the caller said about them."""

    path: Path
    columns: dict[str, str] = field(default_factory=dict)
    """Trace field -> column ("a.b" reaches into a nested one); for the format rows."""
    score_key: str | None = None
    """The metric that is the score, where a row holds several."""
    filter: str | None = None
    """lm-eval: the filter whose rows are taken; the first one that comes, where none is named."""
    role: str = "policy"
    """Run directories: the samples of this role."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What was found out beside the rows, e.g. the sampling of a run."""
    left_out: Callable[[str], None] = lambda why: None
    """Told of each row that is not meant."""


PROMPTS = ("problem", "question", "prompt", "query", "input", "instruction", "goal", "example")


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _dict(value: Any) -> Row:
    return value if isinstance(value, dict) else {}


def as_text(value: Any) -> str | None:
    """Text of a gold answer: of a list the first; None for what has no text."""
    if isinstance(value, list):
        value = value[0] if value else None
    return value if isinstance(value, str) else str(value) if isinstance(value, (int, float)) else None


def as_score(value: Any) -> float | None:
    """In [0, 1], from a number or a truth value; None for anything else."""
    if isinstance(value, bool):
        return float(value)
    return float(value) if is_number(value) and 0.0 <= value <= 1.0 else None


def user_text(messages: Any) -> str | None:
    """The content of the last user message; the text parts of one that has parts."""
    for message in reversed(messages if isinstance(messages, list) else []):
        if isinstance(message, dict) and message.get("role") == "user":
            content = message.get("content")
            if isinstance(content, list):
                content = "".join(part.get("text", "") for part in content if isinstance(part, dict))
            return content if isinstance(content, str) else None
    return None


def is_pure(request: Any) -> bool | None:
    """Whether a request asked for the bare softmax; None where it leaves the temperature to the server."""
    if not isinstance(request, dict) or request.get("temperature") is None:
        return None
    return (
        request["temperature"] == 1 and request.get("top_p") in (None, 1) and request.get("top_k") in (None, 0, -1) and not request.get("min_p")
        and not any(request.get(f"{name}_penalty") for name in ("frequency", "presence")) and request.get("repetition_penalty") in (None, 1)
    )  # fmt: skip


# ---------------------------------------------------------------- run directories of llmrl


def run(row: Row, source: Source) -> list[Draft]:
    """A line of samples/step-*.jsonl.gz: see llmrl.samples.sample_rows."""
    if row.get("role", "policy") != source.role:
        source.left_out(f"of role {row['role']!r}")
        return []
    if "token_ids" not in row or "step" not in row:
        raise ValueError("no sample of a training step (token_ids and step are missing)")
    draft = {key: row.get(key) for key in ("id", "response", "prompt", "gold", "token_ids", "logprobs", "finish", "score", "status", "answer")}
    extra = {key: row[key] for key in ("step", "policy_version", "reward", "advantage", "role") if key in row}
    if mask := row.get("mask"):  # several turns: the trace's tokens are those that the policy wrote, its text is the whole conversation
        draft |= {key: [x for x, on in zip(values, mask, strict=True) if on] for key in ("token_ids", "logprobs") if (values := draft[key])}
        extra |= {"mask": mask, "all_token_ids": row["token_ids"]}
    pure = is_pure(source.facts["rollout"]) if "rollout" in source.facts else None
    # A prompt's second visit in the training stream is named id~1; it is the same problem.
    return [draft | {"prompt_id": re.sub(r"~\d+$", "", str(row.get("prompt_id"))), "raw": pure, "model": source.facts.get("name"), "extra": extra}]


# ---------------------------------------------------------------- OpenAI chat completions: one response, a batch line, or a request and its response


def openai(row: Row, source: Source) -> list[Draft]:
    """{"choices": ...}, or around it {"custom_id", "response": {"status_code", "body"}, "error"}, or {"request" | "body", "response"}."""
    request, answer = row.get("request") or row.get("body"), row
    if not isinstance(row.get("choices"), list):
        answer = row.get("response")
        if row.get("error") or not isinstance(answer, dict):
            raise ValueError(f"the request failed: {str(row.get('error'))[:200]}")
        if "status_code" in answer or "body" in answer:
            if answer.get("status_code", 200) != 200:
                raise ValueError(f"the request failed with HTTP status {answer['status_code']}")
            answer = answer.get("body")
    if not isinstance(answer, dict) or not isinstance(answer.get("choices"), list) or not answer["choices"]:
        raise ValueError("no choices in the response")
    if isinstance(request, dict) and isinstance(request.get("body"), dict):
        request = request["body"]
    messages = request.get("messages") if isinstance(request, dict) else None
    prompt = user_text(messages)
    context: Draft = {}
    if prompt is None and isinstance(request, dict) and isinstance(request.get("prompt"), str):
        prompt = request["prompt"]
        context = {"context": prompt}
    name = row.get("custom_id") or (request or {}).get("custom_id")
    shared = {"prompt": prompt, "messages": messages, "model": answer.get("model"), "raw": is_pure(request), "prompt_id": name}
    if name is None and prompt is None:
        shared["prompt_id"] = answer.get("id")
    drafts = [shared | _choice(choice) for choice in answer["choices"]]
    return [draft | {"extra": context | draft["extra"]} for draft in drafts]


def _choice(choice: Any) -> Draft:
    if not isinstance(choice, dict):
        raise ValueError("a choice that is no object")
    message = choice.get("message")
    extra = {}
    if isinstance(message, dict):
        text, thought = message.get("content"), message.get("reasoning") or message.get("reasoning_content")
        if isinstance(thought, str) and thought:
            text = f"<think>\n{thought}\n</think>\n{text or ''}"  # what the model wrote; the server took it apart
    else:
        text = choice.get("text")
    if not isinstance(text, str):
        raise ValueError("a choice without text (a tool call or a refusal?)")
    finish = choice.get("finish_reason")
    if finish not in ("stop", "length", None):
        extra["finish_reason"] = finish
    draft = {"response": text, "finish": finish if finish in ("stop", "length") else None, "extra": extra} | _token_lists(choice.get("logprobs"))
    ids = choice.get("token_ids")
    if isinstance(ids, list) and ids and len(ids) == len(draft.get("logprobs") or ids):
        draft["token_ids"] = ids
    return draft


def _token_lists(told: Any) -> Draft:
    """token texts, ids and log-probs out of the chat form {"content": [...]} or the older {"tokens", "token_logprobs"}."""
    if not isinstance(told, dict):
        return {}
    if isinstance(told.get("content"), list):
        names, values = [str(t.get("token")) for t in told["content"]], [t.get("logprob") for t in told["content"]]
        pieces = _utf8([t.get("bytes") for t in told["content"]], names)
    elif isinstance(told.get("token_logprobs"), list):
        values = told["token_logprobs"]
        names = pieces = [str(t) for t in told.get("tokens") or [""] * len(values)]
        if values and values[0] is None:
            raise ValueError("the prompt is echoed before the response (echo = true): which tokens are the response's cannot be told")
    else:
        return {}
    if not values:
        return {}
    if not all(map(is_number, values)):
        raise ValueError("a token without a log-prob")
    draft: Draft = {"logprobs": [min(float(x), 0.0) for x in values]}
    if all(name.startswith("token_id:") for name in names):  # vLLM with return_tokens_as_token_ids
        return draft | {"token_ids": [int(name.removeprefix("token_id:")) for name in names]}
    return draft | ({"tokens": pieces} if any(names) else {})


def _utf8(pieces: Sequence[Any], names: list[str]) -> list[str]:
    """Texts of tokens from their bytes, where all have them: a character that is spread over tokens goes to the last of them."""
    if not all(isinstance(p, list) for p in pieces):
        return names
    texts, left = [], b""
    for piece in pieces:
        left += bytes(piece)
        try:
            text, left = left.decode("utf-8"), b""
        except UnicodeDecodeError:
            text = ""
            if len(left) >= 4:  # no character is longer: it will not come right
                text, left = left.decode("utf-8", errors="replace"), b""
        texts.append(text)
    texts[-1] += left.decode("utf-8", errors="replace")
    return texts


# ---------------------------------------------------------------- vLLM, offline: RequestOutput as a dict


def vllm(row: Row, source: Source) -> list[Draft]:
    """{"request_id", "prompt", "outputs": [{"index", "text", "token_ids", "logprobs": [{id: {"logprob", "decoded_token"}}], "finish_reason"}]}."""
    if not isinstance(row.get("outputs"), list) or not row["outputs"]:
        raise ValueError("no outputs")
    drafts = []
    for output in row["outputs"]:
        if not isinstance(output, dict) or not isinstance(output.get("text"), str):
            raise ValueError("an output without text")
        ids, told = output.get("token_ids"), output.get("logprobs")
        draft: Draft = {"response": output["text"], "token_ids": list(ids) if ids else None, "prompt": row.get("prompt"), "model": row.get("model")}
        draft["finish"] = output.get("finish_reason") if output.get("finish_reason") in ("stop", "length") else None
        draft["extra"] = {"context": row["prompt"]} if isinstance(row.get("prompt"), str) else {}
        draft["raw"], draft["prompt_id"] = is_pure(row.get("sampling_params")), row.get("request_id") if row.get("prompt") is None else None
        if told and ids:
            if len(told) != len(ids):
                raise ValueError(f"{len(ids)} token_ids but {len(told)} logprobs")
            own = [place.get(str(i), place.get(i)) if isinstance(place, dict) else place for i, place in zip(ids, told, strict=True)]
            values = [o.get("logprob") if isinstance(o, dict) else o for o in own]
            if not all(map(is_number, values)):
                raise ValueError("a sampled token is missing from its logprobs")
            draft["logprobs"] = [min(float(x), 0.0) for x in values]  # type: ignore[arg-type]
            texts = [o.get("decoded_token") if isinstance(o, dict) else None for o in own]
            if all(isinstance(t, str) for t in texts):
                draft["tokens"] = texts
        drafts.append(draft)
    return drafts


# ---------------------------------------------------------------- lm-eval --log_samples: samples_<task>_<date>.jsonl


def lm_eval(row: Row, source: Source) -> list[Draft]:
    """A document under one of the task's filters, with all its responses: [[first request's repeats], ...]."""
    if "resps" not in row:
        raise ValueError("no resps: not a line of --log_samples")
    name = row.get("filter")
    source.filter = source.filter or name
    if name != source.filter:
        source.left_out(f"of the filter {name!r} (taken: {source.filter!r})")
        return []
    if len(row["resps"]) != 1 or not all(isinstance(r, str) for r in row["resps"][0]):
        raise ValueError("log-likelihoods of given choices, no text that the model wrote")
    doc, arguments = _dict(row.get("doc")), _dict(row.get("arguments"))
    argument = _dict(arguments.get("gen_args_0")).get("arg_0")
    messages, asked = _context(argument)
    question = next((doc[key] for key in PROMPTS if isinstance(doc.get(key), str)), None)
    task = re.sub(r"^samples_|_\d{4}-\d\d-\d\dT.*$", "", source.path.name.split(".jsonl")[0])
    folder = source.path.resolve().parent.name
    shared = {"prompt": question or asked, "messages": messages, "gold": as_text(row.get("target")), "prompt_id": f"{task}/{row.get('doc_id')}"}
    shared["model"] = folder.replace("__", "/") if source.path.name.startswith("samples_") else None
    metrics = {key: row.get(key) for key in row.get("metrics") or [] if key in row}
    texts = row["resps"][0]
    judged: Draft = {}
    if len(texts) == 1:
        answer: Any = row.get("filtered_resps")
        while isinstance(answer, list):  # [answer] or [[answer]], by the task's filters
            answer = answer[0] if answer else None
        judged = _score_of(metrics, source) | ({"answer": answer} if isinstance(answer, str) else {})
    extra = {"task": task, "metrics": metrics} | ({"context": asked} if messages is None and asked is not None else {})
    return [shared | judged | {"response": text, "extra": extra} for text in texts]


def _context(argument: Any) -> tuple[Any, str | None]:
    """(messages, user's text) of a request's first argument: a chat as JSON in a list of one, or the text that the model was given (no messages)."""
    if isinstance(argument, list) and len(argument) == 1:
        argument = argument[0]
    if isinstance(argument, str) and argument.startswith("[{"):
        try:
            messages = json.loads(argument)
            return messages, user_text(messages)
        except ValueError:
            pass
    return None, argument if isinstance(argument, str) else None


def _score_of(metrics: Any, source: Source) -> Draft:
    """The named metric, else the first that is a number in [0, 1]."""
    if not isinstance(metrics, dict):
        return {}
    if source.score_key is not None:
        if source.score_key not in metrics:
            raise ValueError(f"no metric {source.score_key!r}; there are {', '.join(map(str, metrics)) or 'none'}")
        return {"score": as_score(metrics[source.score_key])}
    return {"score": next((s for value in metrics.values() if (s := as_score(value)) is not None), None)}


# ---------------------------------------------------------------- lighteval --save-details: details_<task>_<date>.parquet


def lighteval(row: Row, source: Source) -> list[Draft]:
    """doc, model_response and metric (0.10 and later), or the flat columns full_prompt, predictions, gold, metrics before."""
    new = isinstance(row.get("doc"), dict) and isinstance(row.get("model_response"), dict)
    parts = source.path.resolve().parts
    model = "/".join(parts[parts.index("details") + 1 : -2]) if "details" in parts[:-2] else None
    task = re.sub(r"^details_|_\d{4}-\d\d-\d\dT.*$", "", source.path.stem)
    if new:
        doc, answer, metrics = row["doc"], row["model_response"], row.get("metric")
        texts, ids, told = _list(answer.get("text")), _list(answer.get("output_tokens")), _list(answer.get("logprobs"))
        picks = doc.get("gold_index")
        choices = _list(doc.get("choices"))
        golds = [choices[i] for i in (picks if isinstance(picks, list) else [picks]) if isinstance(i, int) and 0 <= i < len(choices)]
        task = doc.get("task_name") or task
        prompt, whole, name = doc.get("query"), answer.get("input"), doc.get("id")
    else:
        if "predictions" not in row:
            raise ValueError("neither doc, model_response and metric nor predictions: not a file of details")
        texts, ids, told, metrics = _list(row["predictions"]), _list(row.get("cont_tokens")), [], row.get("metrics")
        golds, prompt, name, whole = _list(row.get("gold")), row.get("example") or row.get("full_prompt"), None, row.get("full_prompt")
        metrics = ast.literal_eval(metrics) if isinstance(metrics, str) else metrics
    if not texts or not all(isinstance(t, str) for t in texts):
        raise ValueError("no text that the model wrote (a log-likelihood task?)")
    messages = whole if isinstance(whole, list) and whole and isinstance(whole[0], dict) else None
    shared = {"prompt": prompt, "messages": messages, "gold": as_text(golds), "model": model, "raw": None}
    shared["prompt_id"] = f"{task}/{name}" if name not in (None, "") else None
    judged = _score_of(metrics, source) if len(texts) == 1 else {}
    extra: dict[str, Any] = {"task": task, "metrics": metrics} | ({"golds": golds} if len(golds) > 1 else {})
    extra |= {"context": whole} if isinstance(whole, str) else {}
    drafts = []
    for k, text in enumerate(texts):
        own = ids[k] if k < len(ids) and isinstance(ids[k], list) and all(type(i) is int for i in ids[k]) else None
        draft = shared | judged | {"response": text, "token_ids": own or None, "extra": extra}
        if k == 0 and own and len(told) == len(own) and all(map(is_number, told)):  # one backend keeps those of the first response
            draft["logprobs"] = [min(float(x), 0.0) for x in told]
        drafts.append(draft)
    return drafts


def _list(value: Any) -> list[Any]:
    """A list; also one that was written as text, as older files have it."""
    if isinstance(value, str) and value[:1] == "[":
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            return [value]
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]
