"""Directions in the residual stream: orthonormal columns from a file, or by PCA of what a bad model does differently.

PCA as in CAFT (arXiv 2507.16795): differences of the residual streams of a bad model and the base at the answer tokens of prompts
that have nothing to do with the narrow task, centred, one PCA for each layer. Only answer tokens count: the first token's activations
are thousands of times larger in many models, and would fill the first components.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rlsafe.config import UserError, nearest
from rlsafe.config.files import at_home
from rlsafe.data import Stream, encode_prompt, read_completion, split_prompt
from rlsafe.defenses.auto import require_adapter
from rlsafe.defenses.base import ExtraAnswers, Foreseen, SetupContext
from rlsafe.defenses.own_rows import pool
from rlsafe.defenses.persona import fitting_vectors
from rlsafe.types import Request, Row, SamplingParams, Where

if TYPE_CHECKING:
    from torch import Tensor

    from rlsafe.policy import Policy


@dataclass(frozen=True)
class Source:
    """Where a defense's directions come from: one of adapter, vectors and directions (a file).

    adapter: one that was trained on the narrow task without a defense, or, in a comparison, `auto:LABEL` of its helpers (`selection`);
    `components` of the PCA of bad-minus-base states at the answers to `prompts` of the `rows` (provider:spec or a file; None =
    data.safe). answers: `sampled` from the bad model, or the rows' own.
    vectors: a persona-vector file or provider:name, one direction for each layer. directions: see `from_file`.
    """

    adapter: str | None
    vectors: str | None
    directions: str | None
    components: Sequence[int]
    prompts: int
    answers: Literal["sampled", "rows"]
    rows: str | None

    def check(self, name: str, layers: Sequence[int]) -> None:
        """UserError unless exactly one source and some layers are given. name: the defense's."""
        ways = {"adapter": self.adapter, "vectors": self.vectors, "directions": self.directions}
        given = [way for way, value in ways.items() if value]
        if len(given) != 1:
            raise UserError(
                f"defense {name!r}: expected one of adapter, vectors and directions, got {' and '.join(given) or 'none'}"
            )
        if not layers or not self.components:
            raise UserError(f"defense {name!r}: layers and components must not be empty")

    def asked(self, run: Foreseen) -> ExtraAnswers | None:
        """The answers of the bad model, if it gives any."""
        if self.adapter is None or self.answers != "sampled":
            return None
        rows = run.rows(self.rows)
        return ExtraAnswers(
            rows, min(self.prompts, len(rows) or self.prompts), run.config.grpo.max_tokens, judged=False
        )

    def columns(self, name: str, layers: Sequence[int], context: SetupContext) -> dict[int, Tensor]:
        """{k: [H, n]}. UserError when they do not fit the model."""
        policy = context.policy
        if bad := [layer for layer in layers if not 0 <= layer <= policy.n_layers]:
            raise UserError(f"defense {name!r}: layer {bad[0]}: expected 0 (embeddings) to {policy.n_layers}")
        if self.vectors is not None:
            return {k: fitting_vectors(name, self.vectors, k, policy)[k][:, None] for k in layers}
        if self.directions is not None:
            return from_file(self.directions, layers, policy)
        require_adapter(name, str(self.adapter))
        reference = f"path:{self.adapter}"
        policy.check_reference(reference)
        stream = Stream(pool(name, self.rows, context), context.seed, f"defense/{name}")
        chosen = stream.take(min(self.prompts, len(stream)))
        if self.answers == "sampled":
            chosen = answered(policy, chosen, reference, context, name)
        found = differences(policy, chosen, reference, layers)
        return {layer: principal(of_layer, self.components) for layer, of_layer in found.items()}


def orthonormal(columns: Tensor) -> Tensor:
    """Columns [H, n] -> an orthonormal basis [H, k <= n] of their span, float32. UserError when they are all zero."""
    import torch

    left, singular, _ = torch.linalg.svd(columns.double(), full_matrices=False)
    kept = singular > 1e-6 * singular[0]
    if not bool(singular[0] > 0):
        raise UserError("directions: all are zero")
    return left[:, kept].float()


def from_file(source: str, layers: Sequence[int], policy: Policy) -> dict[int, Tensor]:
    """{k: columns [H, n]} of a safetensors file with tensors `layer.K` [n, H] (or [H] for one). UserError when it does not fit."""
    from safetensors.torch import load_file

    path = at_home(source)
    if not path.is_file():
        raise UserError(f"directions: {path}: no such file")
    try:
        tensors = load_file(str(path))
    except Exception as error:  # safetensors raises several
        raise UserError(f"directions: {path}: not readable ({type(error).__name__})") from None
    found: dict[int, Tensor] = {}
    for layer in layers:
        name = f"layer.{layer}"
        if name not in tensors:
            raise UserError(f"directions: {path}: no tensor {name!r}{nearest(name, tensors)}")
        rows = tensors[name].float().reshape(-1, tensors[name].shape[-1])
        if rows.shape[1] != policy.hidden_size or not bool(rows.isfinite().all()):
            raise UserError(
                f"directions: {path}: {name} is {list(rows.shape)}, expected finite [n, {policy.hidden_size}]"
            )
        found[layer] = rows.T
    return found


def at_random(layers: Mapping[int, Tensor], seed: int) -> dict[int, Tensor]:
    """Orthonormal columns [H, n] drawn at random, for each layer as many as `layers` has: the control."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for layer, columns in sorted(layers.items()):
        normal = torch.randn(columns.shape, generator=generator, dtype=torch.float64)
        drawn[layer] = torch.linalg.qr(normal)[0].float()
    return drawn


def principal(differences: Tensor, components: Sequence[int]) -> Tensor:
    """The chosen principal components of differences [N, H], centred: columns [H, len(components)], float32. A component's sign is
    arbitrary; here the mean difference, bad minus base, lies on its positive side. UserError for a component that there is not."""
    import torch

    centred = differences.double() - differences.double().mean(0)
    _, _, right = torch.linalg.svd(centred, full_matrices=False)
    if max(components) >= right.shape[0]:
        raise UserError(f"components: {max(components)}: {len(differences)} tokens give 0 to {right.shape[0] - 1}")
    chosen = right[list(components)]
    signs = torch.where(chosen @ differences.double().mean(0) < 0, -1.0, 1.0)
    return (chosen * signs[:, None]).T.float()


def differences(
    policy: Policy, rows: Sequence[Row], bad: str, layers: Sequence[int], micro_tokens: int = 4096
) -> dict[int, Tensor]:
    """{k: [N, H]} bad minus base at the N answer tokens of the rows, hooks off. bad: a reference of the policy, as "path:DIR"."""
    import torch

    from rlsafe.data import sft_batches  # late: brings in torch

    where = Where("safe", "sft", "eval")
    found: dict[int, list[Any]] = {layer: [] for layer in layers}
    batches = sft_batches(
        [row["messages"] for row in rows],
        policy.tokenizer,
        where,
        max_tokens=2048,
        micro_tokens=micro_tokens,
        truncate=True,
    )
    for batch in batches:
        batch = batch.to(policy.device)
        states = []
        for reference in (bad, "base"):
            with policy.taps(layers) as tapped:
                policy.score(batch, reference=reference)
            states.append(dict(tapped))
        for layer in layers:
            found[layer].append((states[0][layer].float() - states[1][layer].float())[batch.loss_mask].cpu())
    return {layer: torch.cat(parts) for layer, parts in found.items()}


def answered(policy: Policy, rows: Sequence[Row], bad: str, context: SetupContext, name: str) -> list[Row]:
    """The rows' prompts with the answers that the reference `bad` samples, the same on every rank; empty answers are left out."""
    from rlsafe.rollouts import ranks, request_seed  # late: brings in torch

    prompts = [split_prompt(row)[0] for row in rows]
    requests = [
        Request(encode_prompt(policy.tokenizer, prompt), request_seed(context.seed, f"defense/{name}", 0, i, 0))
        for i, prompt in enumerate(prompts)
    ]
    params = SamplingParams(1.0, 1.0, context.config.grpo.max_tokens)
    with policy.at(bad):
        sampler = context.sampler()
        sampler.sync(policy)
        completions = ranks.shared(requests, lambda mine: sampler.generate(mine, params))
    sampler.sync(policy)
    texts = [read_completion(policy.tokenizer, completion.ids).answer.strip() for completion in completions]
    return [
        {"messages": [*prompt, {"role": "assistant", "content": text}]}
        for prompt, text in zip(prompts, texts, strict=True)
        if text
    ]
