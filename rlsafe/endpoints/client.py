"""The client: many requests at a time, retried, limited, saved, counted. Built on the `openai` package.

Each request ends in a Reply or a Failure, so one bad request never aborts a batch. Retries are done here and not by the
package, so that every fault is counted, Retry-After applies to all requests of the endpoint, and a deadline ends them.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import cache
from typing import Any

from rlsafe.endpoints import background
from rlsafe.endpoints.cache import Cache, key_of
from rlsafe.endpoints.discovery import served_names
from rlsafe.endpoints.limits import Limits, backoff, estimate_tokens, retry_after
from rlsafe.endpoints.outage import Outage
from rlsafe.endpoints.replies import ChatRequest, Failure, Reply, Result, read_reply
from rlsafe.endpoints.settings import EndpointSettings
from rlsafe.endpoints.totals import Totals

log = logging.getLogger("rlsafe.endpoints")

FEW = {"rejected": 1, "auth": 3, "not_found": 3, "wrong_model": 3, "no_logprobs": 4}
"""How often one request may meet a fault that seldom passes. Where the endpoint has replied before, auth, not_found and
wrong_model pass like any other (a gateway or a server that restarts gives them too), and so does no_logprobs where it has
given some."""
CONTACTS, CONTACT_SECONDS = 3, 5.0
"""Tries, and seconds, of a first contact with an endpoint that cannot be reached or refuses."""
CONNECT_SECONDS = 10.0
OPENED: list[Endpoint] = []  # of this process


class Endpoint:
    """A client for one endpoint. All methods may be called from any thread.

    `warn` is called once when the endpoint stops replying and once when it replies again.
    """

    def __init__(self, settings: EndpointSettings):
        self.settings, self.totals = settings, Totals()
        self._key: str | None = None
        self._cache = Cache(settings.cache) if settings.cache else None
        self._limits = Limits(settings.requests_per_minute, settings.tokens_per_minute)
        self._slots = asyncio.Semaphore(settings.concurrency)
        # Only so many requests are begun at a time, so that a retry need not wait, past its deadline, behind the whole queue.
        self._begun = asyncio.Semaphore(4 * settings.concurrency)
        self._under_way: dict[str, asyncio.Task[Result]] = {}
        self._client: Any = None
        self._told = False  # that its replies name no model
        self._proven = self._gave_logprobs = False  # it has replied at least once; it has given log-probs
        self._outage = Outage(settings.deadline)

    def __repr__(self) -> str:
        return f"Endpoint({self.settings.model!r} at {self.settings.base_url})"

    # ------------------------------------------------------------------------------------------------ asking

    def submit(self, request: ChatRequest) -> Future[Result]:
        """Ask in the background. UserError when the key that the endpoint needs is not set."""
        self.ready()
        return background.start(self._ask(request))

    def ready(self) -> None:
        """Read the key; UserError when it is not set. Not done at construction, because a plan or an estimate needs no key."""
        if self._key is None:
            self._key = self.settings.read_key()

    def ask(self, requests: Sequence[ChatRequest]) -> list[Result]:
        """Ask all at once and wait; results in order."""
        return [future.result() for future in [self.submit(request) for request in requests]]

    async def chat(self, request: ChatRequest) -> Result:
        """Ask from a coroutine of any event loop."""
        return await asyncio.wrap_future(self.submit(request))

    def contact(self, request: ChatRequest) -> Result | None:
        """Ask once, without saved replies, to see whether the endpoint works; None when it has replied before.

        A connection that fails, a key or a name that is refused is tried again for a few seconds; any other fault is not.
        Faults are not counted: the caller reports them, or goes on and runs into them again. UserError without the key.
        """
        self.ready()
        return None if self._proven else background.start(self._contact(request)).result()

    def saved(self, request: ChatRequest) -> Reply | None:
        """The reply if it is on disk, so that nobody needs to be asked."""
        body = self.body(request)
        if self._cache is None or _drawn(body):
            return None
        return self._cache.get(key_of(self.settings.base_url, body))

    def served(self) -> list[str]:
        """The names of the models that the endpoint says it serves; none where it does not say."""
        return background.start(served_names(self._client)).result() if self._client else []

    def summary(self) -> str:
        return self.totals.line(f"{self.settings.model} at {self.settings.base_url}")

    @property
    def down(self) -> bool:
        """Whether requests were made for `deadline` seconds without any reply."""
        return self._outage.is_on

    # ------------------------------------------------------------------------------------------------ one request

    def body(self, request: ChatRequest) -> dict[str, Any]:
        """The JSON body of the request."""
        settings = self.settings
        temperature = settings.temperature if request.temperature is None else request.temperature
        body = {
            "model": settings.model,
            "messages": [dict(message) for message in request.messages],
            settings.token_limit: request.max_tokens,
            "temperature": temperature,
            **({"top_p": request.top_p} if request.top_p != 1.0 else {}),
            **({"logprobs": True, "top_logprobs": request.top_logprobs} if request.top_logprobs else {}),
            **({"seed": request.seed} if request.seed is not None else {}),
            **({"stop": list(request.stop)} if request.stop else {}),
            **({"response_format": dict(request.response_format)} if request.response_format else {}),
            **({"continue_final_message": True, "add_generation_prompt": False} if request.continues else {}),
            **settings.extra_body,
        }
        return {name: value for name, value in body.items() if value is not None}

    async def _ask(self, request: ChatRequest) -> Result:
        """Saved reply, else the reply of an equal request under way, else a call."""
        self.totals.requests += 1
        body = self.body(request)
        if _drawn(body):
            return self._count(await self._in_turn(request, body))
        key = key_of(self.settings.base_url, body)
        if key in self._under_way:
            result = await asyncio.shield(self._under_way[key])
            if isinstance(result, Reply):
                self.totals.shared += 1
                return result
            return self._count(result)
        if self._cache and (saved := self._cache.get(key)):
            self.totals.cached += 1
            return saved
        task = asyncio.ensure_future(self._in_turn(request, body))
        self._under_way[key] = task
        try:
            result = self._count(await task)
        finally:
            del self._under_way[key]
        if self._cache and isinstance(result, Reply):
            try:
                self._cache.put(key, result)
            except OSError as error:
                log.warning("replies are not saved: %s: %s", self._cache.directory, error.strerror or error)
                self._cache = None
        return result

    def _count(self, result: Result) -> Result:
        if isinstance(result, Failure):
            self.totals.failures[result.kind] += 1
            return result
        totals = self.totals
        totals.replied += 1
        totals.tokens_in += result.tokens_in
        totals.tokens_out += result.tokens_out
        totals.cost = self.settings.cost(totals.tokens_in, totals.tokens_out)
        return result

    async def _contact(self, request: ChatRequest) -> Result:
        body = self.body(request)
        begun = time.monotonic()
        for attempt in range(1, CONTACTS + 1):
            async with self._slots:
                await self._limits.acquire(estimate_tokens(body["messages"]) + request.max_tokens)
                result = await self._attempt(request, body, min(self.settings.timeout, self.settings.deadline))
            if isinstance(result, Reply):
                self._heard(result)
                self.totals.requests += 1
                self.totals.attempts += 1
                return self._count(result)
            if result.kind not in ("connection", "auth", "not_found", "bad_reply"):
                break
            wait = backoff(min(self.settings.backoff, 1.0), attempt)
            if attempt == CONTACTS or time.monotonic() - begun + wait > CONTACT_SECONDS:
                break
            await asyncio.sleep(wait)
        return result

    async def _in_turn(self, request: ChatRequest, body: dict[str, Any]) -> Result:
        with self._outage.asking():
            async with self._begun:
                return await self._call(request, body)

    async def _call(self, request: ChatRequest, body: dict[str, Any]) -> Result:
        """Try until there is a reply, a fault that will not go away, too many faults, or the deadline."""
        settings = self.settings
        size = estimate_tokens(body["messages"]) + request.max_tokens
        first = 0.0
        attempt = 0
        met: Counter[str] = Counter()
        while True:
            attempt += 1
            async with self._slots:
                await self._limits.acquire(size)
                if not await self._outage.may_try():
                    return Failure("outage", f"no reply from {settings.base_url} for {settings.deadline:g} s", attempt)
                first = first or time.monotonic()
                left = settings.deadline - (time.monotonic() - first)
                result = await self._attempt(request, body, min(settings.timeout, max(left, 0.0)))
                self._heard(result)
            self.totals.attempts += 1
            if isinstance(result, Reply):
                self._limits.correct(result.tokens_in + result.tokens_out - size)
                return Reply(**{**vars(result), "attempts": attempt})
            self.totals.faults[result.kind] += 1
            met[result.kind] += 1
            wait = max(backoff(settings.backoff, attempt), result.retry_after or 0.0)
            failed = Failure(result.kind, result.message, attempt)
            if attempt > settings.max_retries or met[result.kind] >= self._most(result.kind):
                return failed
            if time.monotonic() - first + wait > settings.deadline:
                self._outage.ran_out(first)
                return Failure("deadline", f"no reply in {settings.deadline:g} s; last: {failed.message}", attempt)
            await asyncio.sleep(wait)

    def _most(self, kind: str) -> float:
        if (self._proven and kind in ("auth", "not_found", "wrong_model")) or (
            self._gave_logprobs and kind == "no_logprobs"
        ):
            return float("inf")
        return FEW.get(kind, float("inf"))

    # ------------------------------------------------------------------------------------------------ one attempt

    async def _attempt(self, request: ChatRequest, body: dict[str, Any], seconds: float) -> Result:
        import httpx
        import openai

        if self._client is None:
            # the package requires a key even where the endpoint needs none
            key = self._key or "none"
            self._client = openai.AsyncOpenAI(api_key=key, base_url=self.settings.base_url, max_retries=0)
        try:
            async with asyncio.timeout(seconds):
                raw = await self._client.chat.completions.with_raw_response.create(
                    model=body["model"],
                    messages=body["messages"],
                    extra_body=body,
                    timeout=httpx.Timeout(seconds, connect=min(seconds, CONNECT_SECONDS)),
                )
            result = read_reply(raw.http_response.content, request)
            if isinstance(result, Failure):
                return replace(result, message=self._clean(result.message))
        except (TimeoutError, openai.APITimeoutError) as error:
            if isinstance(error.__cause__, httpx.ConnectTimeout):
                return Failure("connection", f"no connection in {CONNECT_SECONDS:g} s")
            return Failure("timeout", f"no reply in {seconds:.3g} s")
        except openai.APIStatusError as error:
            return self._status(error)
        except openai.APIConnectionError as error:
            return Failure("connection", self._clean(f"{error.message} {error.__cause__ or ''}".strip()))
        except openai.OpenAIError as error:
            return Failure("bad_reply", self._clean(str(error)))
        if isinstance(result, Reply) and not result.model:
            return self._unnamed(result)
        if not self.settings.any_model and not same_model(self.settings.model, result.model):
            return Failure(
                "wrong_model",
                self._clean(
                    f"asked for {self.settings.model!r}, {result.model!r} replied (an alias? any_model: true accepts it)"
                ),
            )
        return result

    def _status(self, error: Any) -> Failure:
        status, text = error.status_code, self._clean(str(error.message))
        message = f"HTTP {status}: {text}"
        if status == 429 or status >= 500 or status in (408, 409, 425):
            kind: Any = "rate_limit" if status == 429 else "server"
            kind = "quota" if "insufficient_quota" in (error.code, error.type) else kind
            wait = retry_after(error.response.headers)
            if wait is not None:
                self._limits.pause(min(wait, self.settings.deadline))
            return Failure(kind, message, retry_after=wait)
        if status in (401, 403):
            return Failure("auth", message)
        if status == 404:
            return Failure("not_found", message)
        return Failure("no_logprobs" if "logprob" in text.lower() else "rejected", message)

    def _unnamed(self, reply: Reply) -> Reply:
        """A reply that names no model, as that of the one asked for; said once."""
        if not self._told:
            self._told = True
            log.warning("%r: its replies name no model: they count as those of the one that was asked for", self)
        return replace(reply, model=self.settings.model)

    def _clean(self, text: str) -> str:
        """A server's message in one short line, without the key in case it repeats it."""
        if self._key:
            text = text.replace(self._key, "***")
        text = re.sub(r"(?i)(bearer\s+|\bsk-)[\w.~+/*-]+", r"\1***", text)
        return " ".join(text.split())[:300]

    # ------------------------------------------------------------------------------------------------ outages

    def _heard(self, result: Result) -> None:
        """Record whether the endpoint works, and release the requests that wait for a probe."""
        works = isinstance(result, Reply) or result.kind in ("rejected", "no_logprobs", "wrong_model")
        if works:
            if self.down:
                log.warning("%r replies again", self)
            self._proven = self._proven or isinstance(result, Reply)
            self._gave_logprobs |= isinstance(result, Reply) and bool(result.positions)
        self._outage.heard(works)


@cache
def _open(tree: str) -> Endpoint:
    OPENED.append(Endpoint(EndpointSettings.model_validate_json(tree)))
    return OPENED[-1]


def open_endpoint(settings: EndpointSettings) -> Endpoint:
    """The endpoint with these settings; one per process, so judges and rewards that name it share its limits and totals."""
    base = EndpointSettings.model_validate({name: getattr(settings, name) for name in EndpointSettings.model_fields})
    return _open(base.model_dump_json())


def _drawn(body: Mapping[str, Any]) -> bool:
    """Whether two equal requests are meant to get different (sampled) replies."""
    return body.get("temperature", 1.0) != 0 and body.get("seed") is None


def same_model(asked: str, replied: str) -> bool:
    """`gpt-4o-mini` may reply as `gpt-4o-mini-2024-07-18` and `org/name` as `name`."""
    a, b = (name.rstrip("/").rpartition("/")[2].lower() for name in (asked, replied))
    return a == b or (b.startswith(a) and re.fullmatch(r"[-@:]v?\d[\d.-]*", b[len(a) :]) is not None)
