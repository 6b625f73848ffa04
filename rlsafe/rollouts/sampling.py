"""Seeds of requests, and sampling from processed distributions with one uniform number per request and token."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlsafe.config import UserError
from rlsafe.data import end_of_turn
from rlsafe.types import Request, SamplingParams


def request_seed(run_seed: int, purpose: str, step: int, row: int, sample: int) -> int:
    """A seed in [0, 2^63) that belongs to one request alone, the same on every machine."""
    key = f"{run_seed}|{purpose}|{step}|{row}|{sample}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


def uniforms(requests: Sequence[Request], length: int) -> Tensor:
    """[B, length] float64 in [0, 1): row i depends on the seed of request i only."""
    rows = [torch.rand(length, generator=torch.Generator().manual_seed(r.seed), dtype=torch.float64) for r in requests]
    return torch.stack(rows)


def processed_logprobs(logits: Tensor, params: SamplingParams) -> Tensor:
    """[B, V] log-probabilities after temperature and top-p (the smallest set of tokens whose mass reaches top_p).

    Temperature 0 means greedy: the log-probs are then those of temperature 1, as in vLLM.
    """
    logits = logits.float()
    if params.temperature > 0:
        logits = logits / params.temperature
    logp = logits.log_softmax(-1)
    if params.temperature == 0 or params.top_p >= 1:
        return logp
    ascending, order = logp.sort(dim=-1)
    dropped = ascending.exp().cumsum(-1) <= 1 - params.top_p
    dropped[:, -1] = False
    return logp.masked_fill(torch.zeros_like(dropped).scatter(1, order, dropped), float("-inf")).log_softmax(-1)


def draw(logp: Tensor, uniform: Tensor, params: SamplingParams) -> Tensor:
    """[B] token ids: argmax when greedy, else the inverse of the cumulative distribution at `uniform` [B].

    One number per request and token makes a completion independent of its batch mates, without [B, V] noise.
    """
    if params.temperature == 0:
        return logp.argmax(-1)
    mass = logp.double().exp().cumsum(-1)
    return (
        torch.searchsorted(mass, uniform.unsqueeze(1) * mass[:, -1:], right=True)
        .squeeze(1)
        .clamp_(max=logp.shape[1] - 1)
    )


def check_lengths(requests: Sequence[Request], params: SamplingParams, limit: int | None, whose: str) -> None:
    """UserError for an empty prompt or one that leaves no room for `max_tokens` within `limit`."""
    for request in requests:
        length = len(request.prompt_ids)
        if length == 0:
            raise UserError("a prompt is empty: it has no tokens to start from")
        if limit is not None and length + params.max_tokens > limit:
            raise UserError(
                f"{whose} takes {limit} tokens: a prompt of {length} leaves no room for {params.max_tokens} more; lower "
                "grpo.max_tokens (rollouts) or evaluate.max_tokens (answers to questions)"
            )


def stop_token_ids(model: str | None, tokenizer: Any = None, revision: str | None = None) -> list[int]:
    """The tokens that end a turn, for every sampler: the tokenizer's end of sequence, those of the model's generation_config.json, and
    the one that training puts at the end of an answer (base models name another one, or none, in the first two).

    model: its directory, or its hub id when its files are in the hub's cache (at `revision`).
    """
    found = [] if tokenizer is None else [tokenizer.eos_token_id]
    file = _generation_config(model, revision) if model else None
    if file is not None:
        ids = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        found += ids if isinstance(ids, list) else [ids]
    if tokenizer is not None and tokenizer.chat_template:
        found.append(end_of_turn(tokenizer))
    return list(dict.fromkeys(i for i in found if i is not None))


def _generation_config(model: str, revision: str | None) -> Path | None:
    """The model's generation_config.json; None when it has none."""
    if Path(model).is_dir():
        file = Path(model) / "generation_config.json"
        return file if file.is_file() else None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(model, "generation_config.json", revision=revision)
    return Path(cached) if isinstance(cached, str) else None
