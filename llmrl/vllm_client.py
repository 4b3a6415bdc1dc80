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
_OFTEN = frozenset({"/v1/completions", "/weight_info"})
"""Asked so often that connections are kept for it."""
ONCE, WRONG, DOWN = 1, 3, 20
"""How often one request may end like this before the run stops: what asking again cannot help, a reply that is wrong, a server that fails."""
ADAPTER = "llmrl-"
"""Begins the names of our adapters on a server."""


class Trouble(Exception):
    """A server did not do what it was asked. tries: ONCE, WRONG or DOWN; answered: it spoke, and is not just out of reach; status: of HTTP."""

    def __init__(self, text: str, tries: int = DOWN, *, answered: bool = True, status: int = 0) -> None:
        super().__init__(text)
        self.tries, self.answered, self.status = tries, answered, status


class Server:
    """One server, and what the engine knows of it."""

    def __init__(self, url: str, http: Any, request_s: float) -> None:
        self.url, self.http, self.request_s = url.rstrip("/"), http, request_s
        self.model = self.root = ""
        """What a request names, and where the server says that it has it from."""
        self.adapter = ""
        """The LoRA adapter that requests name instead, where there is one."""
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
        self.checked = False
        """Its log-probs were found to be of the distribution that it samples from."""
        self.labelled = True
        """It tells what weights it holds: it was started with VLLM_SERVER_DEV_MODE=1. Only sampling goes without."""
        self.takes: frozenset[str] = frozenset()
        """The routes of vllm_routes.py that it has."""
        self.workers = 1
        """Its processes that hold weights."""
        self.joined = ""
        """The group of a broadcast that they are in."""
        self._looks, self._seen, self._looking = 0, "", asyncio.Lock()

    # ------------------------------------------------------------ facts

    async def meet(self) -> list[str]:
        """What model it serves; returns its name and those of its adapters."""
        answer = await self.call("GET", "/v1/models", within_s=10.0)
        with self._understood(answer, "is no list of models"):
            first = answer["data"][0]
            self.model, self.max_length, self.root = first["id"], first.get("max_model_len"), str(first.get("root") or first["id"])
            return [str(card["id"]) for card in answer["data"]]

    async def label(self) -> str:
        """The name of the weights that it says it holds: a server that was restarted says "default"."""
        if not self.labelled:
            return ""
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

    async def receive(self, what: dict[str, Any]) -> None:
        """Has its workers take part in one broadcast."""
        await self.call("POST", "/update_weights", {"update_info": what})

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

    async def resume(self) -> None:
        await self.call("POST", "/resume")

    async def prepare(self, **what: Any) -> None:
        """Before the first update; what: of vllm_plugin.py's Init."""
        await self.call("POST", "/init_weight_transfer_engine", {"init_info": what})

    async def probe_routes(self, adapters: bool) -> None:
        """Asks it for each route whether it has it, whatever its version. Leaves it as `prepare` does."""
        routes, self.joined = {"file"}, ""
        try:
            await self.prepare(leave=True)
        except Trouble as trouble:
            if "Invalid init_info" not in str(trouble):
                raise
            await self.prepare()
        else:
            routes.add("broadcast")
            answer = await self.call("GET", "/get_world_size")
            with self._understood(answer, "does not tell how many workers it has"):
                self.workers = int(answer["world_size"])
        if adapters:
            nowhere = {"lora_name": f"{ADAPTER}probe", "lora_path": "/nowhere/llmrl-probe"}
            with contextlib.suppress(Trouble):  # with LoRA it misses the adapter, without it something else
                await self.call("POST", "/v1/load_lora_adapter", nowhere, told="No adapter found")
                routes.add("adapter")
        self.takes = frozenset(routes)

    async def adopt(self, label: str, folder: Any) -> None:
        """Loads an adapter in PEFT's format, in place of any that it has of ours, and names the weights after it."""
        await self.call("POST", "/pause?mode=abort")
        for name in await self.meet():
            if name.startswith(ADAPTER):
                await self.call("POST", "/v1/unload_lora_adapter", {"lora_name": name}, told="Success")
        body = {"lora_name": ADAPTER + label, "lora_path": str(folder)}
        try:
            await self.call("POST", "/v1/load_lora_adapter", body, told="Success")
        except Trouble as trouble:
            told = f"{trouble} (it was told to load {folder}, a folder that it must see: engine.folder)"
            raise Trouble(told, trouble.tries, answered=trouble.answered) from None
        await self.call("POST", "/reset_prefix_cache")
        await self.call("POST", "/update_weight_version", {"new_version": label})

    async def sleep(self, level: int) -> None:
        """Gives its GPU memory back: 1 keeps a copy of the weights in the computer's memory, 2 does not."""
        await self.call("POST", f"/sleep?level={level}&mode=wait")

    async def wake(self, tag: str) -> None:
        """tag: "weights" or "kv_cache"."""
        await self.call("POST", f"/wake_up?tags={tag}")

    async def rouse(self) -> None:
        """Wakes it where an earlier run left it asleep."""
        answer = await self.call("GET", "/is_sleeping", within_s=10.0)
        with self._understood(answer, "does not tell whether it sleeps"):
            asleep = bool(answer["is_sleeping"])
        if asleep:
            await self.call("POST", "/wake_up")
            await self.resume()

    # ------------------------------------------------------------ tokens

    async def logprobs(self, ids: Sequence[int], first: int = 1) -> list[float]:
        """Of ids[first:] given what stands before each: nats, temperature 1, no token banned."""
        body = {
            "model": self.adapter or self.model, "prompt": list(ids), "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0, "return_token_ids": True,
        }  # fmt: skip
        answer = await self._completion(body)
        with self._understood(answer, f"does not hold the log-probs of {len(ids)} tokens"):
            rows = answer["choices"][0]["prompt_logprobs"]
            told = [float(row[str(token)]["logprob"]) for row, token in zip(rows[1:], ids[1:], strict=True)][first - 1 :]
        if not all(math.isfinite(x) and x < 1e-3 for x in told):
            raise Trouble(f"{self.url} answered log-probs of a text that cannot be: {[x for x in told if not -math.inf < x < 1e-3][:3]}", WRONG)
        return told

    async def _completion(self, body: dict[str, Any]) -> Any:
        try:
            return await self.call("POST", "/v1/completions", body)
        except Trouble as trouble:
            if self.adapter and trouble.status == 404:
                raise Trouble(f"{trouble} (it was restarted: its adapter is gone)") from None
            raise

    async def is_paused(self) -> bool:
        """An update that broke off left it so: it answers no completion before it has whole weights."""
        answer = await self.call("GET", "/is_paused", within_s=10.0)
        with self._understood(answer, "does not tell whether it is paused"):
            return bool(answer["is_paused"])

    async def check_logprobs(self, tokens: Sequence[int]) -> None:
        """Trouble unless log-probs are of the distribution that is sampled from.

        Each of two tokens is made certain by a bias on its logit in turn. Its log-prob must then be 0 both times; the model's own log-probs
        cannot be, since two tokens do not both have more than half.
        """
        for token in tokens[:2]:
            body = {
                "model": self.model, "prompt": [tokens[0]], "max_tokens": 1, "temperature": 1.0, "logprobs": 0, "logit_bias": {str(token): 100.0},
                "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
            }  # fmt: skip
            answer = await self.call("POST", "/v1/completions", body)
            with self._understood(answer, "does not hold the log-prob of a token"):
                (told,) = answer["choices"][0]["logprobs"]["token_logprobs"]
                told = float(told)
            if not abs(told) < 0.1:
                raise Trouble(
                    f"{self.url}: a token that was made certain by logit_bias has log-prob {told:.4g}, not 0: the server tells log-probs of another "
                    "distribution than it samples from; start it with --logprobs-mode processed_logprobs", ONCE,
                )  # fmt: skip
        self.checked = True

    async def tokenized(self, text: str) -> list[int]:
        """The server's own token ids of a text, without special ones before it."""
        answer = await self.call("POST", "/tokenize", {"model": self.model, "prompt": text, "add_special_tokens": False})
        with self._understood(answer, "holds no token ids"):
            return [int(x) for x in answer["tokens"]]

    async def complete(
        self, request: Request, version: int, *, stop_ids: Sequence[int], banned_ids: Sequence[int], vocabulary: int, text: Callable[[list[int]], str],
    ) -> Completion:  # fmt: skip
        """The answer to one request, checked."""
        how = request.sampling
        body: dict[str, Any] = {
            "model": self.adapter or self.model, "prompt": list(request.context_ids), "max_tokens": how.max_new_tokens, "temperature": how.temperature,
            "top_p": how.top_p, "top_k": how.top_k or -1, "min_p": how.min_p, "seed": _seed(request), "logprobs": 0, "return_token_ids": True,
            "stop_token_ids": list(stop_ids), "logit_bias": {str(i): -100.0 for i in banned_ids},
            "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,  # else the model's generation_config.json sets them
        }  # fmt: skip
        if how.stop:
            body |= {"stop": list(how.stop), "include_stop_str_in_output": True}
        answer = await self._completion(body)
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

    async def call(self, method: str, path: str, body: dict[str, Any] | None = None, within_s: float = math.inf, told: str = "") -> Any:
        """The JSON answer, or {} where the body is empty. Trouble: no answer within request_s, not 2xx (with its body), no JSON.

        told: the answer is no JSON, and must have this text in it, with whatever status.
        """
        import httpx2

        limit = min(self.request_s, within_s)
        try:
            async with asyncio.timeout(limit):
                # after an unexpected failure a server answers 500 and closes the connection, which the next request would meet
                headers = {} if path in _OFTEN else {"Connection": "close"}
                response = await self.http.request(method, self.url + path, json=body, headers=headers)
        except TimeoutError:
            raise Trouble(f"{self.url}{path}: no answer within {limit:g} s (request_s = {self.request_s:g})", answered=False) from None
        except httpx2.RequestError as error:
            raise Trouble(f"{self.url}{path}: {type(error).__name__} {error}".rstrip(), answered=False) from None
        if told and told in response.text:
            return {}
        if not response.is_success:
            text = " ".join(response.text.split())[:600]
            code = response.status_code
            raise Trouble(f"{self.url}{path}: HTTP {code}: {text}", DOWN if code in _RETRIED else ONCE, status=code)
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
