"""One vLLM server over HTTP: the adapters it holds, and completions as token ids with their log-probs."""

from __future__ import annotations

import os
import threading
from typing import Any

from rlsafe.config import UserError
from rlsafe.types import Completion, Request, RunError, SamplingParams

START = (
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True python -m vllm.entrypoints.openai.api_server --model MODEL --enable-lora "
    "--max-lora-rank RANK --logprobs-mode processed_logprobs"
)
START_MERGED = (
    """VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config '{"backend": "nccl"}' """
    "--logprobs-mode processed_logprobs"
)
"""The same for servers that are sent full weights."""
PLAIN = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""Sent with every request: for what is left out, a server uses the model's generation_config.json."""


class Unreachable(Exception):
    """No usable answer: the server is down, starting, overloaded or too slow. Another try may succeed."""


class Forgotten(Exception):
    """The server does not know the model or adapter, because it was restarted."""


class Server:
    """A vLLM OpenAI server at `url`. `holds`: the adapter that it is known to have loaded."""

    def __init__(self, url: str, timeout: float):
        from openai import OpenAI

        self.url = url.rstrip("/").removesuffix("/v1")
        key = os.environ.get("VLLM_API_KEY", "none")  # the variable that the server itself reads
        self._client = OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=timeout)
        self.model = ""
        self.max_model_len: int | None = None
        self.holds: str | None = None
        self._lock = threading.Lock()

    def connect(self) -> None:
        """Ask what it serves. Unreachable without an answer; UserError when it is no vLLM server, or gives log-probs from before
        temperature and top-p."""
        cards = [card for card in self._models() if (card.model_extra or {}).get("parent") is None]
        if not cards or "max_model_len" not in (cards[0].model_extra or {}):
            raise UserError(f"sampler.urls: {self.url} is no vLLM server; start one with: {START}")
        self.model, self.max_model_len = cards[0].id, cards[0].model_extra["max_model_len"]
        if not self._tempers():
            raise UserError(
                f"sampler.urls: {self.url} gives raw log-probs, of another distribution than it samples from; "
                "start it with --logprobs-mode processed_logprobs"
            )

    def complete(
        self, adapter: str | None, request: Request, params: SamplingParams, stop: list[int], top: int = 0
    ) -> Completion:
        """One completion with the log-probs of its tokens under the processed distribution.

        Unreachable or Forgotten when another try may help, else RunError.
        """
        choice = self._choice(adapter or self.model, request, params, stop, top)
        extra = choice.model_extra or {}
        if extra.get("prompt_token_ids") != list(request.prompt_ids) or extra.get("token_ids") is None:
            raise RunError(f"{self.url}: did not sample from the tokens that it was sent; expected vLLM 0.31 or newer")
        finish = "stop" if choice.finish_reason == "stop" else "length"
        return Completion(list(extra["token_ids"]), list(choice.logprobs.token_logprobs), finish)  # type: ignore[arg-type]

    def load(self, name: str, directory: str) -> None:
        """Load the adapter in `directory` as `name`, unless it is there already.

        UserError when the server refuses it: it cannot read the directory, runs without --enable-lora, the rank is too high.
        """
        with self._lock:
            if self.holds == name:
                return
            if name not in [card.id for card in self._models()]:
                self._load(name, directory)
            self.holds = name

    def unload(self, name: str, timeout: float | None = None) -> None:
        """Forget an adapter; one that is gone already is fine. timeout: seconds, None = as for any other request."""
        if self.holds == name:
            self.holds = None
        try:
            self._post("/unload_lora_adapter", {"lora_name": name}, timeout)
        except Forgotten:
            pass

    # ------------------------------------------------------------------------------------------------ requests

    def _models(self) -> list[Any]:
        try:
            return self._call(self._client.models.list).data
        except Forgotten:
            raise UserError(f"sampler.urls: {self.url} is no vLLM server; start one with: {START}") from None

    def _load(self, name: str, directory: str) -> None:
        import openai

        try:
            self._post("/load_lora_adapter", {"lora_name": name, "lora_path": directory})
        except Forgotten as error:
            if "No adapter found" in str(error):
                raise UserError(
                    f"sampler.adapter_dir: the server at {self.url} cannot read {directory}; expected a directory that "
                    "trainer and servers see under the same path"
                ) from None
            raise UserError(f"sampler.urls: {self.url} loads no adapters; start it with: {START}") from None
        except Unreachable as error:
            if isinstance(error.__cause__, openai.InternalServerError):  # the server works but refuses this adapter
                raise UserError(f"sampler.urls: {self.url} refuses the adapter: {error}") from None
            raise
        except RunError as error:
            if "already been loaded" not in str(
                error
            ):  # by another process of this run; equal names mean equal content
                raise

    def _tempers(self) -> bool:
        """Whether temperature changes the log-probs that come back (unless all tokens are equally likely)."""
        one, half = (
            self._choice(self.model, Request([1, 2, 3], 0), SamplingParams(t, 1.0, 1), [], top=1) for t in (1.0, 0.5)
        )
        best = [max(choice.logprobs.top_logprobs[0].values()) for choice in (one, half)]
        return best[0] != best[1]

    def _choice(self, model: str, request: Request, params: SamplingParams, stop: list[int], top: int) -> Any:
        answer = self._call(
            lambda: self._client.completions.create(
                model=model, prompt=list(request.prompt_ids), seed=request.seed, logprobs=top,
                temperature=params.temperature, top_p=params.top_p, max_tokens=params.max_tokens,
                extra_body=PLAIN | {"stop_token_ids": stop, "return_token_ids": True},
            )
        )  # fmt: skip
        return answer.choices[0]

    def _post(self, path: str, body: dict[str, str], timeout: float | None = None) -> None:
        import httpx

        client = self._client if timeout is None else self._client.with_options(timeout=timeout)
        self._call(lambda: client.post(path, body=body, cast_to=httpx.Response))

    def _call(self, send: Any) -> Any:
        import openai

        try:
            return send()
        except openai.NotFoundError as error:
            self.holds = None
            raise Forgotten(_said(error)) from error
        except (openai.AuthenticationError, openai.PermissionDeniedError):
            raise UserError(f"sampler.urls: {self.url} wants its key; set VLLM_API_KEY") from None
        except (openai.APIConnectionError, openai.InternalServerError, openai.RateLimitError) as error:
            raise Unreachable(_said(error)) from error
        except openai.APIError as error:
            raise RunError(f"{self.url}: {_said(error)}") from None


def _said(error: Any) -> str:
    """The server's error message on one line."""
    body = getattr(error, "body", None)
    text = body.get("message") if isinstance(body, dict) else None
    return " ".join(str(text or error).split())[:300]
