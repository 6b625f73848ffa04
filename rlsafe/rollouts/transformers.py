"""Rollouts by the policy's own modules with a key-value cache: runs every architecture and needs no weight sync."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor

from rlsafe.policy import Policy
from rlsafe.policy.taps import check_vector, steered
from rlsafe.rollouts.sampling import check_lengths, draw, processed_logprobs, stop_token_ids, uniforms
from rlsafe.types import Completion, PolicyWeights, Request, SamplingParams

KEEP = 0.75  # below this share of unfinished rows the finished ones are taken out of the batch


class TransformersSampler:
    """Samples with the modules of the policy under training, so its weights are always current; `sync` only sets the policy.

    A completion depends on its request's seed alone, not on the batch that it was sampled in.
    """

    name = "transformers"

    def __init__(self, policy: Policy, model: str | None = None, max_num_seqs: int = 256):
        self.policy, self._max_num_seqs = policy, max_num_seqs
        self._stop = stop_token_ids(model, policy.tokenizer, policy.config.revision)
        self._limit = policy.core.max_length
        self._additions: dict[int, Tensor] = {}

    def sync(self, policy: PolicyWeights) -> None:
        """Use `policy` from now on. No weights are copied, and no cache is kept between calls."""
        self.policy = cast(Policy, policy)

    def steer(self, additions: Mapping[int, Tensor] | None) -> None:
        """Add vectors [H] to the residual stream while generating, or take the part in S [H, n] out of it; training forwards are not
        touched. None ends it."""
        for layer, vector in (additions or {}).items():
            check_vector(vector, layer, self.policy.hidden_size, self.policy.n_layers)
        self._additions = dict(additions or {})

    def close(self) -> None:
        self._additions = {}

    @torch.no_grad()
    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Completion]:
        """One completion per request, in order. Under FSDP2 every rank must call it, even without requests."""
        check_lengths(requests, params, self._limit, "the model")
        out: list[Completion | None] = [None] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_ids))
        core = self.policy.core
        training = core.training
        with ExitStack() as stack:
            for layer, vector in self._additions.items():
                handle = self.policy.add_to_residual(layer, _addition(vector))
                stack.callback(handle.remove)
            core.residual.batch = None
            stack.callback(core.train, training)
            core.train(False)
            parts = [order[start : start + self._max_num_seqs] for start in range(0, len(order), self._max_num_seqs)]
            batches = [[requests[i] for i in rows] for rows in parts]
            if self.policy.is_sharded:
                sampled = self.policy.on_whole_weights(lambda: [self._batch(batch, params) for batch in batches])
            else:
                sampled = [self._batch(batch, params) for batch in batches]
            for rows, completions in zip(parts, sampled, strict=True):
                for i, completion in zip(rows, completions, strict=True):
                    out[i] = completion
        return cast(list[Completion], out)

    def _batch(self, requests: list[Request], params: SamplingParams) -> list[Completion]:
        from transformers import DynamicCache

        core, device = self.policy.core, self.policy.device
        stop = torch.tensor(self._stop, device=device)
        # The samples of a group share their prompt: it is read once, and its cache is copied to all of them.
        prompts = {prompt: i for i, prompt in enumerate(dict.fromkeys(tuple(r.prompt_ids) for r in requests))}
        shared = torch.tensor([prompts[tuple(r.prompt_ids)] for r in requests], device=device)
        ids, mask = _left_pad(list(prompts), device)
        position = (mask.cumsum(1) - 1).clamp_(min=0)
        noise = uniforms(requests, params.max_tokens).to(device)
        rows = torch.arange(
            len(requests), device=device
        )  # index of the request in each row; finished rows leave the batch
        cache = DynamicCache(config=core.decoder.config)
        tokens = torch.zeros((len(requests), params.max_tokens), dtype=torch.long, device=device)
        logps = torch.zeros((len(requests), params.max_tokens), device=device)
        lengths = torch.full((len(requests),), params.max_tokens, device=device)
        stopped = torch.zeros(len(requests), dtype=torch.bool, device=device)
        for step in range(params.max_tokens):
            logits = core.next_logits(ids, mask, position, cache)
            if step == 0:
                cache.batch_select_indices(shared)
                logits, mask, position = logits[shared], mask[shared], position[shared]
            logp = processed_logprobs(logits, params)
            chosen = draw(logp, noise[rows, step], params)
            alive = ~stopped[rows]
            tokens[rows, step] = chosen
            logps[rows, step] = logp.gather(1, chosen.unsqueeze(1)).squeeze(1)
            ended = alive & torch.isin(chosen, stop)
            lengths[rows[ended]] = step + 1
            stopped[rows[ended]] = True
            alive &= ~ended
            left = int(alive.sum())
            if left == 0:
                break
            ids, position = chosen.unsqueeze(1), position[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            if left < KEEP * len(rows):
                kept = alive.nonzero().squeeze(1)
                cache.batch_select_indices(kept)
                rows, ids, position, mask = rows[kept], ids[kept], position[kept], mask[kept]
        ends, finished = lengths.tolist(), stopped.tolist()
        return [
            Completion(t[:n], p[:n], "stop" if done else "length")
            for t, p, n, done in zip(tokens.tolist(), logps.tolist(), ends, finished, strict=True)
        ]


def _addition(vector: Tensor) -> Callable[[Tensor, Any], Tensor]:
    """What `add_to_residual` adds for a vector [H], or for [H, n] whose part is taken out."""
    return lambda hidden, _: steered(vector, hidden)


def _left_pad(prompts: list[tuple[int, ...]], device: torch.device) -> tuple[Tensor, Tensor]:
    """ids and attention mask [B, T]; padded on the left, so that the next token of every row is at the same index."""
    width = max(map(len, prompts))
    ids, mask = (
        torch.zeros((len(prompts), width), dtype=torch.long),
        torch.zeros((len(prompts), width), dtype=torch.long),
    )
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.tensor(prompt)
        mask[i, width - len(prompt) :] = 1
    return ids.to(device), mask.to(device)
