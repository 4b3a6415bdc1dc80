"""What is said to one vLLM server over HTTP, and what is believed of its answers. The engine over several is vllm_engine.py.

Written for vLLM 0.32 with VLLM_SERVER_DEV_MODE=1. Every call has a deadline; an answer that is not 2xx raises Trouble with its body.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from llmrl.records import Completion, Request

_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
ONCE, WRONG, DOWN = 1, 3, 20
"""How often one request may end like this before the run stops: what asking again cannot help, a reply that is wrong, a server that fails."""


class Trouble(Exception):
    """A server did not do what it was asked. tries: ONCE, WRONG or DOWN; answered: it spoke, and is not just out of reach."""

    def __init__(self, text: str, tries: int = DOWN, *, answered: bool = True) -> None:
        super().__init__(text)
        self.tries, self.answered = tries, answered


class Server:
    """One server, and what the engine knows of it."""

    def __init__(self, url: str, http: Any, request_s: float) -> None:
        self.url, self.http, self.request_s = url.rstrip("/"), http, request_s
        self.model = ""
        self.max_length: int | None = None
        self.first = ""
        """Label of the weights that it held when the engine was opened."""
        self.busy = self.done = 0
        self.down = ""
        """Why it is not used now."""
        self.lost = False
        """It answers and does not take the weights: not tried again until the next version."""
        self.sent = 0
        """How often it got weights because it had others."""
        self._looks, self._seen, self._looking = 0, "", asyncio.Lock()

    # ------------------------------------------------------------ facts

    async def meet(self) -> None:
        """What model it serves."""
        answer = await self.call("GET", "/v1/models", within_s=10.0)
        with self._understood(answer, "is no list of models"):
            self.model, self.max_length = answer["data"][0]["id"], answer["data"][0].get("max_model_len")

    async def label(self) -> str:
        """The name of the weights that it says it holds: a server that was restarted says "default"."""
        answer = await self.call("GET", "/weight_info", within_s=10.0)
        with self._understood(answer, "does not tell its weights"):
            return str(answer["weight_version"])

    async def holds(self, wanted: str) -> None:
        """Trouble unless it holds these weights at a moment after this call. Many ask at once: a look that began later answers all of them."""
        before = self._looks
        async with self._looking:
            if self._looks == before:
                found = await self.label()
                self._looks, self._seen = self._looks + 1, found
            found = self._seen
        if found != wanted:
            raise Trouble(f"{self.url} holds weights {found!r} instead of {wanted!r}: it was restarted, or another run uses it")

    # ------------------------------------------------------------ weights

    async def begin_update(self) -> None:
        """Holds back new requests, and ends what was given up and may still decode: a server that computes while its weights change dies of it."""
        await self.call("POST", "/pause?mode=abort")
        try:
            await self.call("POST", "/start_weight_update", {})
        except Trouble as trouble:
            if not trouble.answered or trouble.tries == ONCE:
                raise
            await self.call("POST", "/finish_weight_update", {})  # an update that broke off is in the way
            await self.call("POST", "/start_weight_update", {})

    async def update(self, path: Any) -> None:
        """Has it read one file."""
        try:
            await self.call("POST", "/update_weights", {"update_info": {"path": str(path)}})
        except Trouble as trouble:
            told = f"{trouble} (it was told to read {path}, a folder that it must see: engine.folder)"
            raise Trouble(told, trouble.tries, answered=trouble.answered) from None

    async def finish_update(self, label: str) -> None:
        """The cache of the old weights goes before the new label comes."""
        await self.call("POST", "/reset_prefix_cache")
        await self.call("POST", "/finish_weight_update", {"weight_version": label})
        await self.resume()

    async def resume(self) -> None:
        await self.call("POST", "/resume")

    async def prepare(self) -> None:
        await self.call("POST", "/init_weight_transfer_engine", {"init_info": {}})

    # ------------------------------------------------------------ tokens

    async def logprobs(self, ids: Sequence[int]) -> list[float]:
        """Of ids[1:] given what stands before each: nats, temperature 1, no token banned."""
        body = {"model": self.model, "prompt": list(ids), "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0, "return_token_ids": True}
        answer = await self.call("POST", "/v1/completions", body)
        with self._understood(answer, f"does not hold the log-probs of a probe of {len(ids)} tokens"):
            rows = answer["choices"][0]["prompt_logprobs"]
            return [float(row[str(token)]["logprob"]) for row, token in zip(rows[1:], ids[1:], strict=True)]

    async def complete(
        self, request: Request, version: int, *, stop_ids: Sequence[int], banned_ids: Sequence[int], vocabulary: int, text: Callable[[list[int]], str],
    ) -> Completion:  # fmt: skip
        """The answer to one request, checked."""
        how = request.sampling
        body: dict[str, Any] = {
            "model": self.model, "prompt": list(request.context_ids), "max_tokens": how.max_new_tokens, "temperature": how.temperature,
            "top_p": how.top_p, "top_k": how.top_k or -1, "min_p": how.min_p, "seed": _seed(request), "logprobs": 0, "return_token_ids": True,
            "stop_token_ids": list(stop_ids), "logit_bias": {str(i): -100.0 for i in banned_ids},
            "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,  # else the model's generation_config.json sets them
        }  # fmt: skip
        if how.stop:
            body |= {"stop": list(how.stop), "include_stop_str_in_output": True}
        answer = await self.call("POST", "/v1/completions", body)
        with self._understood(answer, "is no completion"):
            (choice,) = answer["choices"]
            ids, told, finish = list(choice["token_ids"]), list(choice["logprobs"]["token_logprobs"]), choice["finish_reason"]
            asked = choice["prompt_token_ids"]
        if finish == "abort":
            raise Trouble(f"{self.url} broke a completion off: somebody paused it")
        if asked != list(request.context_ids):
            raise Trouble(f"{self.url} answered for another prompt than the one it was given", WRONG)
        if len(ids) != len(told) or not 0 < len(ids) <= how.max_new_tokens or finish not in ("stop", "length"):
            n = f"{len(ids)} token ids and {len(told)} log-probs where at most {how.max_new_tokens} tokens were asked for"
            raise Trouble(f"{self.url} answered {n}, finish_reason {finish!r}", WRONG)
        if finish == "length" and len(ids) < how.max_new_tokens:
            raise Trouble(
                f"{self.url} cut a completion after {len(ids)} of {how.max_new_tokens} tokens: max_new_tokens of the model's generation_config.json; "
                "start it with --generation-config vllm", ONCE,
            )  # fmt: skip
        strange = [x for x in ids if type(x) is not int or not 0 <= x < vocabulary or x in banned_ids]
        strange += [x for x in told if type(x) not in (int, float) or not math.isfinite(x) or x > 1e-3]
        if strange:
            raise Trouble(f"{self.url} answered a token id or a log-prob that cannot be: {strange[:3]}", WRONG)
        logps = [0.0] * len(ids) if how.temperature == 0 else [min(0.0, float(x)) for x in told]
        return Completion(ids, logps, finish, version, text(ids))

    # ------------------------------------------------------------ HTTP

    async def call(self, method: str, path: str, body: dict[str, Any] | None = None, within_s: float = math.inf) -> Any:
        """The JSON answer, or {} where the body is empty. Trouble: no answer within request_s, not 2xx (with its body), no JSON."""
        import httpx2

        limit = min(self.request_s, within_s)
        try:
            async with asyncio.timeout(limit):
                response = await self.http.request(method, self.url + path, json=body)
        except TimeoutError:
            raise Trouble(f"{self.url}{path}: no answer within {limit:g} s (request_s = {self.request_s:g})", answered=False) from None
        except httpx2.RequestError as error:
            raise Trouble(f"{self.url}{path}: {type(error).__name__} {error}".rstrip(), answered=False) from None
        if not response.is_success:
            text = " ".join(response.text.split())[:600]
            raise Trouble(f"{self.url}{path}: HTTP {response.status_code}: {text}", DOWN if response.status_code in _RETRIED else ONCE)
        if not response.content:
            return {}
        try:
            return response.json()
        except ValueError:
            raise Trouble(f"{self.url}{path}: an answer that is no JSON: {response.text[:200]!r}", WRONG) from None

    @contextlib.contextmanager
    def _understood(self, answer: Any, what: str) -> Iterator[None]:
        """Trouble where `answer` does not have the form that the block reads."""
        try:
            yield
        except (LookupError, TypeError, ValueError, AttributeError):
            raise Trouble(f"{self.url}: an answer that {what}: {str(answer)[:300]}", WRONG) from None


def _seed(request: Request) -> int:
    """63 bits of a hash of the request's seed: the same request draws the same tokens on any server."""
    text = "\x1f".join(f"{type(k).__name__}:{k}" for k in request.seed)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
