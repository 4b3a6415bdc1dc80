"""A client of OpenAI-compatible endpoints: retries within a time budget, a cap, a cache on disk, replies held to a schema, counts.

What a request costs is counted in `Endpoint.counters`. The API key comes from an environment variable and goes into one header; it
is in no cache key, and it is taken out of every text that is shown.
Source of the protocol: the OpenAI API reference, "Create chat completion" and "Structured outputs".
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Sequence
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from llmrl.rewards.reply_cache import KEEP_S, ReplyCache

Structured = Literal["json_schema", "json_object", "none"]
_RETRIED = frozenset({408, 409, 425, 429}) | frozenset(range(500, 600))
_CONNECT_S = 5.0
_SHOWN = 400  # characters of a server's or a model's text in an error


class EndpointError(Exception):
    """No valid reply: the endpoint is down, refuses, does not keep to the schema, or a limit is reached. Its text may be shown."""


class EndpointTimeout(EndpointError):
    """The time budget of a request ran out while the endpoint was silent."""


class EndpointReply(EndpointError):
    """The endpoint answers, but its reply breaks the schema twice: asking again would bring the same."""


class EndpointLimit(EndpointError):
    """max_calls or max_usd is reached: nothing was sent."""


class Endpoint:
    """One model behind one base_url. Use it from coroutines of any event loop; each loop has its own connections.

    base_url: what stands before "/chat/completions", e.g. "http://localhost:8000/v1".
    api_key_env: NAME of the environment variable that holds the key; None sends no key.
    timeout_s: seconds for one request with all its retries, waits for a free place included.
    attempt_timeout_s: seconds for one attempt of it, after which it is sent again; None = as long as the budget lasts.
    retries: attempts beyond the first after a failed connection, an attempt's timeout, or a status 408, 409, 425, 429 or 5xx. Waits
    are backoff_s * 2**n (8 s at most) times a factor in [0.5, 1] from a hash of the content, or Retry-After where that is longer.
    max_concurrent: requests in flight at a time, per process. Proxies are taken from the environment (HTTPS_PROXY, NO_PROXY).
    body: more fields of the request, in place of ours where they have the same name; leave_out: fields that are not sent.
    cache: folder of the replies kept on disk; None keeps none. Only replies that match their schema are kept.
    usd_per_mtok: [input, output] price of a million tokens. max_calls, max_usd: where to stop, per process; up to max_concurrent
    requests that are in flight when max_usd is passed are still paid.
    Counters: NAME/calls (attempts sent), cache_hits, retries, repairs (replies asked for again because they broke the schema), failures
    (requests without a valid reply), prompt_tokens, completion_tokens, unmetered (replies that told no usage), and usd where prices are given.
    Raises ValueError naming the argument that makes no sense.
    """

    def __init__(
        self, *, base_url: str, model: str, api_key_env: str | None = None, timeout_s: float = 9.0, attempt_timeout_s: float | None = None,
        retries: int = 4, backoff_s: float = 0.5, max_concurrent: int = 16, structured: Structured = "json_schema",
        body: dict[str, Any] | None = None, leave_out: Sequence[str] = (), cache: Path | None = None,
        usd_per_mtok: Sequence[float] | None = None, max_calls: int | None = None, max_usd: float | None = None, name: str = "judge",
    ) -> None:  # fmt: skip
        self.base_url, self.model = _checked_url(base_url), model
        self._key = _key_from(api_key_env)
        _positive(timeout_s=timeout_s, max_concurrent=max_concurrent)
        _positive(**{k: v for k, v in {"attempt_timeout_s": attempt_timeout_s, "max_calls": max_calls, "max_usd": max_usd}.items() if v is not None})
        if not model or retries < 0 or backoff_s < 0:
            raise ValueError(f"model = {model!r}, retries = {retries}, backoff_s = {backoff_s}; expected a name and numbers from 0")
        if usd_per_mtok is not None and (len(usd_per_mtok) != 2 or min(usd_per_mtok) < 0):
            raise ValueError(f"usd_per_mtok = {usd_per_mtok!r}; expected [price of a million input tokens, price of a million output tokens]")
        if max_usd is not None and usd_per_mtok is None:
            raise ValueError(f"max_usd = {max_usd} needs the prices; give usd_per_mtok = [input, output], in USD per million tokens")
        self.timeout_s, self._attempt_s, self._retries, self._backoff_s = timeout_s, attempt_timeout_s, retries, backoff_s
        self._max_concurrent, self._structured, self._body, self._leave_out = max_concurrent, structured, dict(body or {}), tuple(leave_out)
        self._prices, self._max_calls, self._max_usd, self._name = usd_per_mtok, max_calls, max_usd, name
        self._cache = None if cache is None else ReplyCache(cache)
        self.worst_case_s = timeout_s + (KEEP_S if self._cache else 0.0)
        counted = ("calls", "cache_hits", "retries", "repairs", "failures", "prompt_tokens", "completion_tokens", "unmetered")
        self.counters: dict[str, float] = {f"{name}/{key}": 0.0 for key in (*counted, *(["usd"] if usd_per_mtok else []))}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._client: Any = None
        self._places = asyncio.Semaphore(max_concurrent)

    async def ask(self, messages: Sequence[dict[str, str]], *, schema: dict[str, Any] | None = None, title: str = "reply") -> Any:
        """The model's reply to `messages`: a text, or with a schema the JSON value that matches it. A reply that does not match is asked
        for once more, with the reason. Raises EndpointTimeout and EndpointError.
        """
        request: dict[str, Any] = {"model": self.model, "messages": list(messages), **self._body}
        if schema is not None and self._structured == "json_schema":
            request["response_format"] = {"type": "json_schema", "json_schema": {"name": title, "strict": True, "schema": schema}}
        elif schema is not None and self._structured == "json_object":
            request["response_format"] = {"type": "json_object"}
        request = {key: value for key, value in request.items() if key not in self._leave_out}
        key = hashlib.sha256(json.dumps([request, schema], sort_keys=True).encode()).hexdigest()
        value, kept = await self._counted(self._answer(request, schema, key))
        if self._cache and kept:  # outside the budget, which a reply that has come cannot exceed any more
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._cache.put(key, self.model, *kept), KEEP_S)
        return value

    async def call(self, path: str, request: dict[str, Any] | None = None) -> dict[str, Any]:
        """The JSON object that base_url + path answers to POST of `request`, or to GET without one; retries, cap and limits as for `ask`."""
        key = hashlib.sha256(json.dumps([path, request], sort_keys=True).encode()).hexdigest()
        return await self._counted(self._send(path, request, key, time.monotonic() + self.timeout_s))

    async def close(self) -> None:
        """Closes the connections of the running loop."""
        if self._client is not None and self._loop is asyncio.get_running_loop():
            await self._client.aclose()
        self._client = self._loop = None

    def _count(self, name: str, amount: float = 1.0) -> None:
        self.counters[f"{self._name}/{name}"] += amount

    async def _counted(self, work: Any) -> Any:
        try:
            async with asyncio.timeout(self.timeout_s):
                return await work
        except TimeoutError:
            self._count("failures")
            raise EndpointTimeout(f"no reply from {self.base_url} within timeout_s = {self.timeout_s:g} s") from None
        except EndpointError:
            self._count("failures")
            raise

    async def _answer(self, request: dict[str, Any], schema: dict[str, Any] | None, key: str) -> tuple[Any, tuple[str, Any] | None]:
        """(the value, what is to be kept in the cache: its text and tokens)."""
        end, problem = time.monotonic() + self.timeout_s, ""
        cached = await self._cache.get(key) if self._cache else None
        if cached is not None:
            value, problem = _read(cached, schema)
            if not problem:
                self._count("cache_hits")
                return value, None
        for attempt in range(2):
            reply = await self._send("/chat/completions", request, f"{key}{attempt}", end)
            text, why = _text_of(reply)
            tokens = self._meter(reply)
            value, problem = (None, why) if text is None else _read(text, schema)
            if not problem:
                return value, (text or "", tokens)
            problem = self._scrub(problem + (f" ({why})" if text is not None and why else ""))
            if attempt == 0:
                self._count("repairs")
                again = f"That reply cannot be used: {problem}. Reply once more, with nothing but one JSON object that matches the schema."
                request = {**request, "messages": [
                    *request["messages"], {"role": "assistant", "content": text or "(no text)"}, {"role": "user", "content": again},
                ]}  # fmt: skip
        raise EndpointReply(f"the reply of {self.model} does not match the schema, twice: {problem}")

    def _meter(self, reply: dict[str, Any]) -> tuple[int, int] | None:
        """Adds up (prompt, completion) tokens of the reply; None where it does not tell them."""
        usage = reply.get("usage")
        read, written = (usage.get("prompt_tokens"), usage.get("completion_tokens")) if isinstance(usage, dict) else (None, None)
        if not isinstance(read, int) or not isinstance(written, int) or min(read, written) < 0:
            self._count("unmetered")
            if self._max_usd is not None:
                raise EndpointError("the endpoint tells no token usage, so max_usd cannot be kept; leave max_usd out and use max_calls")
            return None
        self._count("prompt_tokens", read)
        self._count("completion_tokens", written)
        if self._prices is not None:
            self._count("usd", (read * self._prices[0] + written * self._prices[1]) / 1e6)
        return read, written

    def _spend(self) -> None:
        """Raises where a limit allows no further call."""
        if self._max_calls is not None and self.counters[f"{self._name}/calls"] >= self._max_calls:
            raise EndpointLimit(f"max_calls = {self._max_calls} calls of this process are used up")
        if self._max_usd is not None and self.counters[f"{self._name}/usd"] >= self._max_usd:
            raise EndpointLimit(f"max_usd = {self._max_usd:g} USD of this process are used up")
        self._count("calls")

    async def _send(self, path: str, request: dict[str, Any] | None, key: str, end: float) -> dict[str, Any]:
        """One JSON object, after as many attempts as it takes. `end`: time.monotonic() after which nothing is sent again."""
        client, places = self._connected()
        method, content = ("GET", None) if request is None else ("POST", json.dumps(request).encode())  # ASCII: a half pair goes as an escape
        for attempt in range(self._retries + 1):
            wait, failure = 0.0, ""
            async with places:
                self._spend()
                try:
                    async with asyncio.timeout(self._attempt_s):
                        response = await client.request(method, self.base_url + path, content=content)
                except TimeoutError:
                    failure = f"no reply within attempt_timeout_s = {self._attempt_s} s"
                except _request_error() as error:
                    failure = f"{type(error).__name__}: {error}"
                else:
                    if response.is_success:
                        return self._object(response)
                    failure = f"HTTP {response.status_code}: {_server_text(response)}"
                    if response.status_code not in _RETRIED:
                        raise EndpointError(self._scrub(f"{self.base_url}{path}: {failure}"))
                    wait = _retry_after(response.headers.get("retry-after"))
            if attempt == self._retries:
                raise EndpointError(self._scrub(f"{self.base_url}{path}: gave up after {attempt + 1} attempts; {failure}"))
            wait = max(wait, self._pause(key, attempt))
            if time.monotonic() + wait >= end:
                told = f"the next attempt would be in {wait:.1f} s, beyond timeout_s = {self.timeout_s:g} s"
                raise EndpointError(self._scrub(f"{self.base_url}{path}: gave up after {attempt + 1} attempts, {told}; {failure}"))
            await asyncio.sleep(wait)
            self._count("retries")
        raise AssertionError("unreachable")

    def _connected(self) -> tuple[Any, asyncio.Semaphore]:
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            import httpx2

            # asyncio.timeout holds the budget; a limit of the client's own would only hide which of the two was reached
            headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {self._key}"} if self._key else {})}
            limits = httpx2.Limits(max_connections=self._max_concurrent, max_keepalive_connections=self._max_concurrent)
            self._client = httpx2.AsyncClient(timeout=httpx2.Timeout(None, connect=_CONNECT_S), limits=limits, headers=headers)
            self._places, self._loop = asyncio.Semaphore(self._max_concurrent), loop
        return self._client, self._places

    def _pause(self, key: str, attempt: int) -> float:
        """Seconds before the next attempt. From a hash and not from a random state: the same content waits the same in every run."""
        share = int.from_bytes(hashlib.sha256(f"{key}:{attempt}".encode()).digest()[:4], "big") / 2**32
        return min(8.0, self._backoff_s * 2**attempt) * (0.5 + 0.5 * share)

    def _object(self, response: Any) -> dict[str, Any]:
        try:
            found = response.json()
        except (ValueError, RecursionError) as error:
            raise EndpointError(self._scrub(f"{self.base_url} answers no JSON: {_server_text(response)}")) from error
        if not isinstance(found, dict):
            raise EndpointError(f"{self.base_url} answers a JSON {type(found).__name__}; expected an object")
        return found

    def _scrub(self, text: str) -> str:
        return text.replace(self._key, "[API key]") if self._key else text


# ---------------------------------------------------------------- arguments


def _checked_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        good, parts = False, urlsplit("")
    if "@" in parts.netloc or parts.query or parts.fragment:  # not shown: it may hold a password
        raise ValueError("base_url holds a user, a query or a fragment; give the bare address, and the key through api_key_env")
    if not good or re.search(r"[\s\\]", url):
        raise ValueError(f'base_url = {url!r}; expected an address such as "http://localhost:8000/v1"')
    return url.rstrip("/")


def _key_from(name: str | None) -> str | None:
    if name is None:
        return None
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):  # not shown: a key pasted here must not reach a log
        raise ValueError('api_key_env is the NAME of an environment variable, e.g. "OPENAI_API_KEY", never the key itself')
    key = os.environ.get(name, "").strip()
    if not key:
        raise ValueError(f"api_key_env: the environment variable {name} is not set; export it, or leave api_key_env out where no key is needed")
    if not key.isascii() or not key.isprintable():
        raise ValueError(f"api_key_env: the environment variable {name} holds characters that no HTTP header can carry")
    return key


def _positive(**numbers: float) -> None:
    for name, value in numbers.items():
        if not value > 0:
            raise ValueError(f"{name} = {value}; expected a number above 0")


# ---------------------------------------------------------------- replies


def _request_error() -> type[Exception]:
    import httpx2

    return httpx2.RequestError


def _server_text(response: Any) -> str:
    """The reason a server gives, on one line: OpenAI's {"error": {"message": ...}} where it is there."""
    text = response.text
    try:
        found = json.loads(text)
        text = str(found["error"]["message"])
    except (ValueError, LookupError, TypeError, RecursionError):
        pass
    return " ".join(text.split())[:_SHOWN]


def _retry_after(value: str | None) -> float:
    """Seconds; the header is a number of them or an HTTP date (RFC 9110, 10.2.3). 0 where it is neither."""
    if not value:
        return 0.0
    try:
        if re.fullmatch(r"\s*\d+(\.\d+)?\s*", value):
            return float(value)
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def _text_of(reply: dict[str, Any]) -> tuple[str | None, str]:
    """(text of the first choice, remark on how it ended); text None where there is none."""
    try:
        choice = reply["choices"][0]
        message = choice["message"]
        text, refusal, finish = message.get("content"), message.get("refusal"), choice.get("finish_reason")
    except (LookupError, TypeError, AttributeError):
        raise EndpointError(f"the endpoint's answer is no chat completion: {json.dumps(reply)[:_SHOWN]}") from None
    if not isinstance(text, str) or not text.strip():
        return None, f"it holds no text{f'; refusal: {str(refusal)[:_SHOWN]}' if refusal else ''}{f'; finish_reason {finish}' if finish else ''}"
    return text, "it was cut at the token limit" if finish == "length" else ""


def _read(text: str, schema: dict[str, Any] | None) -> tuple[Any, str]:
    """(value, "") or (None, problem). The whole text must be the JSON value; only a Markdown fence around the whole is taken off."""
    # Nothing is searched for inside a text: a reply that quotes '{"score": 10}' from what it judges must not give that score.
    if schema is None:
        return text, ""
    fenced = re.fullmatch(r"\s*```(?:json)?[ \t]*\n(.*)\n[ \t]*```\s*", text, re.DOTALL)
    try:
        value = json.loads(fenced[1] if fenced else text, object_pairs_hook=_once, parse_constant=_no_constant)
    except RecursionError:
        return None, "it is nested too deeply"
    except ValueError as error:
        return None, f"it is no JSON: {error}; it begins {text[:80]!r}"
    from jsonschema import Draft202012Validator

    errors = sorted(Draft202012Validator(schema).iter_errors(value), key=lambda e: list(map(str, e.absolute_path)))
    if errors:
        return None, f"{errors[0].json_path}: {errors[0].message[:_SHOWN]}"
    return value, ""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in an object")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")
