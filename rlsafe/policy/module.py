"""The part of the policy that the trainer wraps: decoder, final hidden states and the chunked head in one forward.

DDP and FSDP only gather parameters and reduce gradients around the wrapped module's own forward, so the head has to be
inside it, and under FSDP every forward without gradient too; and no [B, T, V] logits ever exist.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlsafe.config import UserError
from rlsafe.losses.head import HeadOutput, head
from rlsafe.policy.taps import Residual, decoder_blocks

HeadReference = tuple[Tensor, Tensor | None, Tensor | None]
"""hidden [N, H], head weight [V, H] or None (= the policy's), head bias [V] or None."""


class Outputs(NamedTuple):
    """One wrapped forward. logp [N], kls: one [N] per reference, entropy [N], hidden {layer: [B, T, H]}, log_mass [N]."""

    logp: Tensor
    kls: list[Tensor]
    entropy: Tensor | None
    hidden: dict[int, Tensor]
    log_mass: Tensor | None = None


class PolicyModule(nn.Module):
    """A causal LM (plain or PEFT-wrapped) with the language-model head, `output`, taken apart from the decoder."""

    decoder: Any
    output: nn.Linear

    def __init__(self, model: Any, what: str = "the model"):
        super().__init__()
        self.model = model
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        config = base.config.get_text_config()
        self.n_layers, self.hidden_size = int(config.num_hidden_layers), int(config.hidden_size)
        self.softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2, 3
        self.logit_scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere
        self.logit_scale /= float(getattr(config, "logits_scaling", None) or 1.0)  # Granite
        decoder, output = base.get_decoder(), base.get_output_embeddings()
        if output is None or not hasattr(output, "weight"):
            raise UserError(f"{what}: has no output embeddings; expected a causal language model")
        # Past PyTorch, which would register these modules a second time: `model` already holds their parameters.
        vars(self).update(decoder=decoder, output=output)
        self.residual = Residual(decoder_blocks(self.decoder, self.n_layers, what), self.hidden_size)

    def hidden_states(self, ids: Tensor) -> Tensor:
        """Final-norm hidden states [B, T, H] of right-padded ids.

        No attention mask: with right padding a causal model's tokens never see a pad, and unmasked kernels are faster.
        """
        with self.autocast():
            return self.decoder(input_ids=ids, use_cache=False).last_hidden_state

    def autocast(self) -> AbstractContextManager[Any]:
        """Under a half-precision base PEFT keeps the adapter in float32; its matmuls still run in the base's dtype."""
        weight = self.output.weight
        half = weight.dtype in (torch.bfloat16, torch.float16)
        return torch.autocast(weight.device.type, weight.dtype) if half else nullcontext()

    def apply_head(
        self, hidden: Tensor, targets: Tensor, references: Sequence[HeadReference] = (), temperature: float = 1.0,
        with_entropy: bool = False, top_p: float = 1.0, kl_temperature: float | None = None,
    ) -> HeadOutput:  # fmt: skip
        """Log-probs [N] of the targets given the states [N, H] that predict them, and the KLs to the references."""
        return head(
            hidden, self.output.weight, targets, references, temperature=temperature, bias=self.output.bias,
            softcap=self.softcap, logit_scale=self.logit_scale, with_entropy=with_entropy, top_p=top_p,
            kl_temperature=kl_temperature,
        )  # fmt: skip

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] in float32 of hidden states [..., H]; for sampling the next token only."""
        logits = self.output(hidden.to(self.output.weight.dtype)).float() * self.logit_scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    @property
    def max_length(self) -> int | None:
        """Longest sequence that the position embeddings cover; None when the config does not say."""
        return getattr(self.decoder.config, "max_position_embeddings", None)

    def next_logits(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """Next-token logits [B, V] (float32) after left-padded ids [B, t].

        They extend `cache` (a DynamicCache of the decoder's config, empty at first); mask [B, past + t], positions [B, t].
        """
        with self.autocast():
            out = self.decoder(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            )
            return self.logits(out.last_hidden_state[:, -1])

    def forward(self, run: Callable[..., Any], *arguments: Any) -> Any:
        """`run(*arguments)`. DDP and FSDP act around a module's `forward`, so everything that uses the weights goes through it."""
        return run(*arguments)

    def outputs(
        self, ids: Tensor, positions: Tensor, targets: Tensor, references: Sequence[HeadReference] = (),
        temperature: float = 1.0, layers: Sequence[int] = (), with_entropy: bool = False, top_p: float = 1.0,
        kl_temperature: float | None = None,
    ) -> Outputs:  # fmt: skip
        """ids [B, T]; positions [N] index the flattened [B * T] states that predict targets [N]."""
        taps: AbstractContextManager[dict[int, Tensor]] = self.residual.tap(layers) if layers else nullcontext({})
        with taps as tapped:
            last = self.hidden_states(ids)
        states = last.flatten(0, 1).index_select(0, positions)
        out = self.apply_head(states, targets, references, temperature, with_entropy, top_p, kl_temperature)
        return Outputs(out.logp, out.kls, out.entropy, dict(tapped), out.log_mass)


def scatter(values: Tensor, positions: Tensor, shape: torch.Size) -> Tensor:
    """values [N] of the predicting states at flat `positions` -> [B, T]: each at its target, one to the right."""
    out = values.new_zeros(shape.numel())
    return out.index_put((positions + 1,), values).view(shape)


def predicting(mask: Tensor) -> Tensor:
    """Flat indices [N] into B * T of the states that predict the masked targets [B, T]; index 0 is never a target."""
    mask = mask.bool().clone()
    mask[:, 0] = False
    return mask.flatten().nonzero().squeeze(1) - 1


@torch.no_grad()
def verify_head(module: PolicyModule, what: str) -> None:
    """UserError when decoder and head do not reproduce the model's own logits: the model does something else in between."""
    ids = torch.arange(1, 5, device=module.output.weight.device).unsqueeze(0)
    training = [part for part in module.modules() if part.training]
    module.eval()  # dropout of an adapter to go on with would differ from one forward to the next
    with module.autocast():  # over a quantised base norms are float32 and the head is not
        own = module.model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
    ours = module.logits(module.hidden_states(ids)[0]).log_softmax(-1)
    for part in training:  # module by module: the model may be in eval mode while its adapter trains
        part.training = True
    gap = float((own - ours).abs().max())
    if not gap < (1e-3 if module.output.weight.dtype == torch.float32 else 0.2):
        raise UserError(
            f"{what}: its logits are not head(decoder), log-probs differ by {gap:.2g}: not a supported architecture"
        )
