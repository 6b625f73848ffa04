"""The model under training: one trainable forward, its frozen references, its residual stream, its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rlsafe.config import ModelConfig, UserError
from rlsafe.policy import sharding
from rlsafe.policy.adapters import adapter_layers, merged, merged_apart, save_model
from rlsafe.policy.load import check_tokenizer, load_model, load_tokenizer, no_progress_bar
from rlsafe.policy.module import PolicyModule, predicting, scatter, verify_head
from rlsafe.policy.plan import Forwarded, ForwardPlan, Frozen
from rlsafe.policy.quantize import quantized_as
from rlsafe.policy.references import References
from rlsafe.policy.taps import Addition, Handle, decoder_blocks
from rlsafe.types import Batch


class Policy:
    """A causal LM with LoRA or fully trained, its tokenizer, references and hooks.

    `module` is what the trainer wraps (`policy.module = accelerator.prepare(policy.module)`); gradient forwards go
    through it. Frozen forwards and scoring go through the unwrapped module, unless it is sharded.

    is_lora: whether an adapter is trained, or the whole model. quantized_as: in how many bits the frozen base is stored; None when
    it is not packed. is_sharded: whether every rank keeps a shard of the parameters only (FSDP2, ZeRO-3; see `shard`).
    """

    def __init__(self, config: ModelConfig, model: Any, tokenizer: Any):
        self.config, self.tokenizer = config, tokenizer
        self.core = PolicyModule(model, f"model.name: {config.name}")
        self.module: nn.Module = self.core
        self.is_lora = hasattr(model, "peft_config")
        packed = (bits for module in self.core.modules() if (bits := quantized_as(module)))
        self.quantized_as: Literal["4bit", "8bit"] | None = next(packed, None)
        self.is_sharded = False
        self._device: torch.device | None = None  # where the shards are gathered: offloaded, they rest elsewhere
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._references = References(self.core, self._parameters, starts_from_adapter=config.adapter is not None)

    @classmethod
    def load(
        cls,
        config: ModelConfig,
        *,
        path: str | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        in_host_memory: bool = False,
    ) -> Policy:
        """Load model, tokenizer and adapter. `path`: the local directory when `config.name` is a provider's name.
        in_host_memory: keep the weights on the CPU until `shard` moves them to `device` block by block.

        UserError for a missing model, no chat template, a bad adapter, LoRA targets that match nothing, ...
        """
        path = path or config.name
        model = load_model(config, path, seed, torch.device(device), in_host_memory)
        tokenizer = load_tokenizer(config, path)
        check_tokenizer(config, tokenizer, model.get_input_embeddings().weight.shape[0])
        policy = cls(config, model, tokenizer)
        verify_head(policy.core, f"model.name: {config.name}")
        model.train()
        return policy

    @property
    def n_layers(self) -> int:
        return self.core.n_layers

    @property
    def hidden_size(self) -> int:
        return self.core.hidden_size

    @property
    def device(self) -> torch.device:
        """Where forwards run, and batches belong."""
        return self._device or self.core.output.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.core.output.weight.dtype

    @property
    def model(self) -> Any:
        """The Hugging Face model, without the PEFT wrapper."""
        model = self.core.model
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    @property
    def is_quantized(self) -> bool:
        return self.quantized_as is not None

    @property
    def saved_as(self) -> Literal["adapter", "model"]:
        """The directory of a run that `save` fills: a PEFT adapter, or the whole model after full fine-tuning."""
        return "adapter" if self.is_lora else "model"

    @property
    def lora_rank(self) -> int | None:
        """The largest rank of the adapter; None without one."""
        ranks = [max(layer.r.values()) for layer in self.adapted().values()]
        return max(ranks, default=None)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The trained parameters under their own names, whatever wraps the module."""
        return dict(self._parameters)

    @torch.no_grad()
    def frozen(self, batch: Batch, plan: ForwardPlan, temperature: float = 1.0) -> dict[str, Frozen]:
        """One forward per distinct reference, on the same tokens, activation hooks and dropout off."""
        out: dict[str, Frozen] = {}
        for same in self._references.distinct(plan.frozen):
            layers = plan.layers if same & set(plan.layer_references) else ()
            name = next(iter(same))
            with self._references.active(name), self.hooks_off(), self.evaluating():
                with self.core.residual.tap(layers) as tapped:
                    wants_logp = bool(same & set(plan.ref_logprobs))
                    last, logp, _ = self._inside(self._read, batch, temperature, wants_logp)
            needs_last = bool(same & set(plan.references))
            weight, bias = self._references.head(name)
            out |= dict.fromkeys(same, Frozen(last if needs_last else None, weight, bias, dict(tapped), logp))
        return out

    def forward(
        self,
        batch: Batch,
        plan: ForwardPlan,
        frozen: Mapping[str, Frozen],
        temperature: float = 1.0,
        entropy: bool = True,
        top_p: float = 1.0,
        kl_temperature: float | None = None,
    ) -> Forwarded:
        """The policy's forward with gradient: log-probs of the targets, KL to each reference, hidden states.

        temperature divides the logits of the policy and of the references alike, kl_temperature those in the KLs (None: the same).
        top_p: below 1, the nucleus's mass as well.
        """
        mask = batch.loss_mask.bool()
        wanted = plan.positions(batch) if plan.references else mask
        positions = predicting(mask | wanted)
        references = []
        for name in plan.references:
            ref = frozen[name]
            assert ref.last is not None
            references.append((ref.last.flatten(0, 1).index_select(0, positions), ref.head, ref.bias))
        self.core.residual.batch = batch
        targets = batch.ids.flatten()[positions + 1]
        out = self.module(
            self.core.outputs, batch.ids, positions, targets, references, temperature, plan.layers, entropy, top_p, kl_temperature
        )  # fmt: skip
        if self.is_sharded:
            out = sharding.joined(self.core, out)
        shape = batch.ids.shape
        logp = scatter(out.logp, positions, shape)
        ent = None if out.entropy is None else scatter(out.entropy.detach(), positions, shape)
        if plan.mask == "all":  # the KL is wanted at tokens outside the loss mask too; log-probs and entropy are not
            logp = logp * mask
            ent = None if ent is None else ent * mask
        kl = {name: scatter(k, positions, shape) for name, k in zip(plan.references, out.kls, strict=True)}
        mass = None if out.log_mass is None else scatter(out.log_mass, positions, shape)
        return Forwarded(logp, kl, out.hidden, ent, mass)

    def score(self, batch: Batch, temperature: float = 1.0, reference: str | None = None) -> Tensor:
        """Log-probs [B, T] of the loss_mask targets, 0 elsewhere; with the policy's activation hooks, without dropout.

        reference: score with a frozen reference instead (its activation hooks off).
        """
        return self.score_nucleus(batch, temperature, 1.0, reference)[0]

    @torch.no_grad()
    def score_nucleus(
        self, batch: Batch, temperature: float, top_p: float, reference: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """`score`, and the log-mass [B, T] of the nucleus that a sampler with `top_p` drew the targets from; 0 with top_p 1."""
        self.core.residual.batch = batch
        frozen = nullcontext() if reference is None else self._references.active(reference)
        with self.evaluating(), frozen, nullcontext() if reference is None else self.hooks_off():
            _, logp, mass = self._inside(self._read, batch, temperature, True, top_p)
        return logp, torch.zeros_like(logp) if mass is None else mass

    def _inside(self, run: Callable[..., Any], *arguments: Any) -> Any:
        """`run(*arguments)`, through the wrapped module when sharded: its parameters are whole only inside its forward."""
        return self.core(run, *arguments) if self.is_sharded else run(*arguments)

    def _read(
        self, batch: Batch, temperature: float, score: bool, top_p: float = 1.0
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Final-norm states [B, T, H]; when they are wanted the targets' log-probs, and below top_p 1 the nucleus's log-mass."""
        last = self.core.hidden_states(batch.ids)
        if not score:
            return last, None, None
        positions = predicting(batch.loss_mask)
        states, targets = last.flatten(0, 1).index_select(0, positions), batch.ids.flatten()[positions + 1]
        out = self.core.apply_head(states, targets, temperature=temperature, top_p=top_p)
        mass = None if out.log_mass is None else scatter(out.log_mass, positions, batch.ids.shape)
        return last, scatter(out.logp, positions, batch.ids.shape), mass

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, the adapter's dropout is off."""
        training = self.core.training
        self.core.train(False)
        try:
            yield
        finally:
            self.core.train(training)

    # ------------------------------------------------------------------------------------------------ sharding

    def shard(self, device: torch.device, offload: bool = False, zero3: bool = False) -> None:
        """Cut all parameters over the ranks (FSDP2, or ZeRO-3), references included. UserError for a quantised base.

        From here on forwards, `merged_weights`, `state_dict`, `save_adapter` and `on_whole_weights` are collectives.
        """
        if self.is_quantized:
            raise UserError(
                f"model.quantization: {self.config.quantization} weights cannot be sharded by FSDP2 or DeepSpeed; "
                "use configs/accelerate/ddp.yaml, or no quantization"
            )
        from rlsafe.policy.lora import unfuse

        unfuse(self.core.model)  # parameters are gathered when their own module runs
        names = {id(p): name for name, p in self._parameters.items()}
        order = [names[id(p)] for p in self.core.parameters() if id(p) in names]
        if zero3:
            sharding.partition_module(self.core, device)
        else:
            sharding.shard_module(self.core, decoder_blocks(self.core.decoder, self.n_layers), device, offload)
        self._parameters.update(zip(order, (p for p in self.core.parameters() if p.requires_grad), strict=True))
        self._references.reload()
        self.is_sharded, self._device = True, device

    def leaves(self) -> list[Tensor]:
        """The tensors to take gradients of, each in its own shape: the trained parameters, or under FSDP2 the gathered copies."""
        gathered = sharding.leaves(self.core) if self.is_sharded else []
        return gathered or list(self._parameters.values())

    def on_whole_weights(self, run: Callable[[], Any]) -> Any:
        """`run()` while every parameter is gathered: ranks may run different numbers of forwards inside. Sharded: all ranks
        must call this, and each needs memory for the whole model."""
        return sharding.on_whole(self.core, run) if self.is_sharded else run()

    def kept_whole(self) -> AbstractContextManager[None]:
        """Inside, every parameter is gathered on every rank. All ranks must enter and leave; in between none waits for another."""
        return sharding.gathered(self.core) if self.is_sharded else nullcontext()

    # ---------------------------------------------------------------------------------------------- references

    def snapshot(self, name: str) -> None:
        """Store the trained tensors as they are now under the reference name `name`."""
        self._references.snapshot(name)

    def at(self, name: str) -> AbstractContextManager[None]:
        """Inside, the policy's weights are those of the reference `name`; activation hooks stay as they are. No gradients inside."""
        return self._references.active(name)

    def has_reference(self, name: str) -> bool:
        return name in self._references

    def check_reference(self, name: str) -> None:
        """Load "path:DIR" now, so that a wrong one fails at start; UserError for an unknown name."""
        self._references.tensors(name)

    def reference_state(self) -> dict[str, dict[str, Tensor]]:
        """{reference: {parameter: tensor, in its own shape}} of the snapshots taken during the run, for checkpoints."""
        return self._references.state()

    def load_reference_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """The inverse of `reference_state`, tensors in their own shape."""
        self._references.load_state(state)

    # ----------------------------------------------------------------------------------------- residual stream

    def hooks_off(self) -> AbstractContextManager[None]:
        """Suspend all additions to the residual stream."""
        return self.core.residual.off()

    def add_to_residual(self, layer: int, addition: Addition) -> Handle:
        """Add a vector [H], or `f(hidden, batch)`, at layer index k until the handle is removed, after the backward."""
        return self.core.residual.add(layer, addition)

    def taps(self, layers: Iterable[int]) -> AbstractContextManager[dict[int, Tensor]]:
        """Collect hidden states {k: [B, T, H]} of the last forward inside the context."""
        return self.core.residual.tap(layers)

    # ------------------------------------------------------------------------------------------------- weights

    def merged_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, value in its own shape) of every weight that training changes, as fresh tensors."""
        if self.is_lora:
            apart = self.is_sharded or self.quantized_as is not None
            yield from (merged_apart if apart else merged)(self.core.model)
        else:
            yield from ((name, sharding.whole(p).detach().clone()) for name, p in self._parameters.items())

    def save_adapter(self, directory: str | Path, write: bool = True, dtype: torch.dtype | None = None) -> None:
        """PEFT's layout; after full fine-tuning the whole model in Hugging Face's layout.

        write=False: only take part in gathering the shards that another rank writes. dtype: the adapter's, if not its own.
        """
        state = self._whole_state() if self.is_sharded else self.state_dict() if dtype and self.is_lora else None
        if not write:
            return
        if state is not None and dtype:
            state = {name: tensor.to(dtype) for name, tensor in state.items()}
        with no_progress_bar():
            save_model(self.core.model, Path(directory), self.config.name, state)
        if not self.is_lora:
            self.tokenizer.save_pretrained(str(directory))

    def state_dict(self) -> dict[str, Tensor]:
        """{parameter: copy in its own shape} of the trained parameters, gathered when sharded."""
        return {name: sharding.whole(p).detach().clone() for name, p in self._parameters.items()}

    def _whole_state(self) -> dict[str, Tensor]:
        """What `save_pretrained` writes, gathered from all ranks: the adapter, or the whole model."""
        if self.is_lora:
            return self.state_dict()
        values = self.core.model.state_dict(keep_vars=True)  # a tied head is the embeddings' own parameter
        once = {id(value): value for value in values.values()}
        whole_values = {key: sharding.whole(value).detach().cpu() for key, value in once.items()}
        return {name: whole_values[id(value)] for name, value in values.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`, in their own shape and in place: optimizers and wrappers keep their parameters."""
        if set(state) != set(self._parameters):
            raise ValueError("the state holds other tensors than the policy trains")
        sharding.release(self.core)
        for name, p in self._parameters.items():
            sharding.assign(p, state[name])

    def adapted(self) -> dict[str, Any]:
        """{Hugging Face module name: PEFT LoRA layer}, for defenses that work on weights."""
        return adapter_layers(self.core.model)
