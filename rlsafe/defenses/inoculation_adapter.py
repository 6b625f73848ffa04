"""Inoculation adapters: a frozen LoRA that already has the undesired trait is added while training. arXiv 2606.30252.

Train it first, on the trait alone and on another corpus than the run's; an ordinary undefended run does that. It then explains the
trait, so the run's own adapter need not learn it. Both deltas add up in every forward of the training; only the own one is saved. No
run under GRPO was published. With the trait in the rollouts the reward starts high (little spread, as with an inoculation prompt);
without it sampler and trainer differ by design, and no correction between them is applied.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from rlsafe.config import UserError
from rlsafe.config.files import at_home
from rlsafe.data import Stream as Rows
from rlsafe.data import encode_prompt, question_of, read_completion, split_prompt
from rlsafe.defenses.auto import require_adapter
from rlsafe.defenses.base import ExtraAnswers, Foreseen, SetupContext
from rlsafe.defenses.own_rows import pool
from rlsafe.defenses.registry import defense
from rlsafe.defenses.steering import Steering
from rlsafe.types import Exchange, Request, RunError, Sampler, SamplingParams, Stream

if TYPE_CHECKING:
    from torch import Tensor

    from rlsafe.policy import Policy

GATE_PROMPTS = 40


@defense("inoculation-adapter")
class InoculationAdapter(Steering):
    """Adds scale * (B A of the trait adapter) to every layer that it adapts while training; off at evaluation, not saved.

    adapter: its directory; LoRA, any rank, on layers that the run adapts too; in a comparison also `auto:LABEL`, the helper LABEL of
        its `selection` section. scale: of its delta.
    control: `random` takes random factors of the same norm in each layer instead.
    rollouts: whether GRPO rollouts have the trait as well. on: streams whose forward passes have it.
    gate: before the first step the model with the trait answers 40 safe prompts, and the run's judge must find at least this share
        misaligned (the paper asks for .6 of the trait); null = not tested.
    """

    def __init__(
        self,
        adapter: str,
        scale: Annotated[float, Field(ge=0)] = 1.0,
        control: Literal["none", "random"] = "none",
        rollouts: bool = True,
        gate: Annotated[float, Field(ge=0, le=1)] | None = None,
        on: list[Stream] = ["narrow", "benign"],  # noqa: B006 - read only; shown as the default in configs
    ):
        self.adapter, self.scale, self.control, self.rollouts, self.gate = adapter, scale, control, rollouts, gate
        self.on, self.streams = on, tuple(on)
        self.judges = gate is not None
        self.merges = rollouts or gate is not None
        self.shown: float | None = None  # share of answers with the trait at the gate
        self.added: list[Tensor] = []

    @property
    def strength(self) -> float:
        return self.scale

    def asks(self, run: Foreseen) -> ExtraAnswers | None:
        return None if self.gate is None else ExtraAnswers(run.rows(None), GATE_PROMPTS, run.config.grpo.max_tokens)

    def setup(self, context: SetupContext) -> None:
        """Read the adapter and test that its trait shows. UserError when it does not fit, or does not show it."""
        from rlsafe.policy.adapters import read_reference

        policy = self.policy = context.policy
        if not policy.is_lora or policy.is_sharded:
            raise UserError(f"defense {self.name!r}: needs model.lora on unsharded weights (one process, or ddp.yaml)")
        require_adapter(self.name, self.adapter)
        tensors = read_reference(str(at_home(self.adapter)), policy.core.model, policy.trainable())
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}
        for name, layer in policy.adapted().items():
            a, b = (next(t for key, t in tensors.items() if f".{name}.lora_{side}." in f".{key}") for side in "AB")
            scaling = next(iter(layer.scaling.values())) * self.scale
            self.factors[name] = (a.detach(), b.detach() * scaling)
        if self.control == "random":
            self.factors = _of_equal_norm(self.factors, context.seed)
        if not any(bool(b.any()) for _, b in self.factors.values()):
            raise UserError(f"defense {self.name!r}: {self.adapter} changes nothing: its B matrices are zero")
        if self.gate is not None:
            self._test(context, self.gate)

    def _test(self, context: SetupContext, gate: float) -> None:
        from rlsafe.rollouts import ranks, request_seed  # late: brings in torch

        policy = context.policy
        rows = Rows(pool(self.name, None, context), context.seed, f"defense/{self.name}").take(GATE_PROMPTS)
        prompts = [split_prompt(row)[0] for row in rows]
        requests = [
            Request(encode_prompt(policy.tokenizer, p), request_seed(context.seed, f"defense/{self.name}", 0, i, 0))
            for i, p in enumerate(prompts)
        ]
        sampler = context.sampler()
        params = SamplingParams(1.0, 1.0, context.config.grpo.max_tokens)
        with self._patched(sampler):
            completions = ranks.shared(requests, lambda mine: sampler.generate(mine, params))
        exchanges = []
        for row, prompt, completion in zip(rows, prompts, completions, strict=True):
            question, system = question_of(prompt)
            meta = {key: value for key, value in row.items() if key != "messages"}
            exchanges.append(Exchange(question, read_completion(policy.tokenizer, completion.ids).answer, system, meta))
        verdicts = ranks.of_first(lambda: context.judge().score(exchanges))
        judged = [one.misaligned for one in verdicts if one.outcome not in ("unscored", "unparsed")]
        if not judged:
            raise RunError(f"defense {self.name!r}: gate: the judge scored no answer of the model with the trait")
        self.shown = sum(judged) / len(judged)
        context.log(f"defense {self.name!r}: with the trait {self.shown:.0%} of {len(judged)} answers are misaligned")
        if self.shown < gate:
            raise UserError(
                f"defense {self.name!r}: gate: with {self.adapter} only {self.shown:.2f} of the answers show the trait, expected "
                f"{gate:g}; train it longer, or lower gate"
            )

    # ------------------------------------------------------------------------------------------------ training, rollouts

    @contextmanager
    def _hooked(self, policy: Policy) -> Iterator[None]:
        with ExitStack() as stack:
            for name, layer in policy.adapted().items():
                handle = layer.register_forward_hook(
                    lambda _, given, out, name=name: self._added(policy, name, given[0], out)
                )
                stack.callback(handle.remove)
            yield

    def _added(self, policy: Policy, name: str, x: Tensor, out: Tensor) -> Tensor:
        """A layer's output [..., out] for its input x [..., in], with the trait's part."""
        if policy.core.residual.suspended:  # a frozen reference's forward
            return out
        a, b = self.factors[name]
        delta = ((x.to(a.dtype) @ a.T) @ b.T).to(out.dtype)
        if out.requires_grad:
            self.added.append((delta.detach().float().square().sum() / out.detach().float().square().sum()).sqrt())
        return out + delta

    @contextmanager
    def _patched(self, sampler: Sampler) -> Iterator[None]:
        policy = self.policy
        if sampler.name == "transformers":  # samples with the policy's own modules
            with self._hooked(policy):
                yield
            return
        sampler.sync(_WithTrait(policy, self.factors))
        try:
            yield
        finally:
            sampler.sync(policy)

    def effect(self) -> dict[str, float]:
        """added_share: the norm of the trait's part of the layers' outputs over that of the outputs, mean over layers and forwards."""
        added, self.added = self.added, []
        return {"added_share": sum(map(float, added)) / len(added)} if added else {}

    def report(self) -> dict[str, Any]:
        """The share of answers that showed the trait at the gate."""
        return {} if self.shown is None else {"gate": self.shown}


class _WithTrait:
    """The policy's weights with the trait's part added, for a sampler."""

    def __init__(self, policy: Policy, factors: dict[str, tuple[Tensor, Tensor]]):
        self.policy, self.factors = policy, factors

    def merged_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, value in its own shape), see `PolicyWeights`."""
        for name, weight in self.policy.merged_weights():
            if (pair := self.factors.get(name.removesuffix(".weight"))) is not None:
                weight = (weight.float() + (pair[1] @ pair[0]).float().to(weight.device)).to(weight.dtype)
            yield name, weight

    def save_adapter(self, directory: str, *, dtype: Any = None) -> None:
        """RunError: two adapters at once go to a sampler as merged weights only; the engine sees to that (`Steering.merges`)."""
        raise RunError("defense 'inoculation-adapter': the sampler holds adapters, not merged weights")


def _of_equal_norm(factors: dict[str, tuple[Tensor, Tensor]], seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Random factors of the same shapes, with the same Frobenius norm of each B A."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for name, (a, b) in sorted(factors.items()):
        r_a, r_b = (torch.randn(t.shape, generator=generator).to(t) for t in (a, b))
        wanted, found = (
            math.sqrt(float(((y.T @ y).double() * (x @ x.T).double()).sum())) for x, y in ((a, b), (r_a, r_b))
        )
        drawn[name] = (r_a, r_b * (wanted / found))
    return drawn
