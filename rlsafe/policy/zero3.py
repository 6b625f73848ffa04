"""DeepSpeed ZeRO-3: every rank keeps a slice of each parameter, of its gradient and of the optimizer's moments.

Between forwards a parameter is empty and this rank's slice of it is `parameter.ds_tensor`; DeepSpeed's hooks gather a module's
parameters when it runs. DeepSpeed only partitions, reduces and steps here; losses, the moment of a step and the contents of a
checkpoint are the loop's, as without it. `rlsafe.policy.sharding` chooses between these functions and those for FSDP2.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_OF = "_rlsafe_slice_of"  # attribute of a kept slice: the parameter that it was cut like
_ENGINE = "_rlsafe_zero3"  # attribute of the partitioned module


def _settings(max_norm: float | None) -> dict[str, Any]:
    """The loop divides losses by the counts of the whole step, so DeepSpeed must not scale them (accumulation 1)."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # No parameter stays gathered between two forwards: references are swapped into the slices there.
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0},
    }


def _deepspeed(device: torch.device) -> Any:
    """The package with its logging off; on CPUs without its shared-memory operator, which would have to be compiled first."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # torch warns at every call that DeepSpeed uses a deprecated function
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed

    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # warns of the plain Python objects that a forward is given
    return deepspeed


def partition_module(root: Any, device: torch.device) -> None:
    """Slice all parameters in place over all ranks, one at a time on `device`; buffers are moved there unsliced."""
    _deepspeed(device).zero.Init(module=root, config_dict_or_path=_settings(None))
    for buffer in root.buffers():
        buffer.data = buffer.data.to(device)


class Zero3:
    """DeepSpeed's engine around a partitioned module, with an optimizer's methods for the loop.

    max_norm: gradients are clipped to it in `step`; None leaves them.
    """

    def __init__(self, root: Any, optimizer: torch.optim.Optimizer, max_norm: float | None):
        deepspeed = _deepspeed(root.output.weight.device)
        self._safe: Any = deepspeed.utils
        self._parameters: list[Any] = [p for group in optimizer.param_groups for p in group["params"]]
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=root, optimizer=optimizer, config=_settings(max_norm), dist_init_required=False
        )
        for parameter in (root.output.weight, root.output.bias):  # used outside of the head's own forward
            if parameter is not None:
                deepspeed.zero.register_external_parameter(root, parameter)
        self._whole = False
        setattr(root, _ENGINE, self)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self._optimizer.optimizer.param_groups

    # ------------------------------------------------------------------------------------------------ one step

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch's scalar loss, averaged over ranks, to the slices. A collective."""
        self._optimizer.clear_backward_seen_flag()  # `engine.forward`, which is not called here, would do this for each micro-batch
        self._engine.backward(loss)

    def gradient_norm(self) -> Tensor:
        """L2 norm (scalar) of the accumulated gradient over all parameters and ranks. A collective."""
        squares = [self._safe.safe_get_local_grad(p).double().square().sum() for p in self._parameters]
        total = torch.stack(squares).sum()
        torch.distributed.all_reduce(total)
        return total.sqrt()

    def step(self) -> None:
        self._engine.step()

    def zero_grad(self) -> None:
        """Clear the accumulated gradient: the next micro-batch is the first of its step."""
        self._optimizer.zero_grad()

    # ------------------------------------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """As an optimizer on one process gives it, with gathered moments; and the float32 copies of half-precision weights."""
        inner = self._optimizer.optimizer
        numbers = range(len(self._parameters))
        groups = [
            {**{k: v for k, v in group.items() if k != "params"}, "params": [*numbers]} for group in inner.param_groups
        ]
        first: dict[str, Tensor] = next(iter(inner.state.values()), {})
        moments = {
            i: {name: self._moment(p, name, value) for name, value in first.items()}
            for i, p in enumerate(self._parameters)
            if first
        }
        halves = {i: p for i, p in enumerate(self._parameters) if p.ds_tensor.dtype != torch.float32}
        masters = {i: self._safe.safe_get_full_fp32_param(p) for i, p in halves.items()}
        return {"state": moments, "param_groups": groups, **({"masters": masters} if masters else {})}

    def _moment(self, parameter: Any, name: str, value: Tensor) -> Tensor:
        return value.clone() if value.dim() == 0 else self._safe.safe_get_full_optimizer_state(parameter, name)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`; the number of processes may have changed since."""
        if state["state"]:
            first = state["state"][0]
            for flat in self._optimizer.fp32_partitioned_groups_flat:
                self._optimizer.optimizer.state[flat] = {
                    name: torch.zeros_like(flat) if value.dim() else value.to(flat.device, copy=True)
                    for name, value in first.items()
                }
        for i, parameter in enumerate(self._parameters):
            for name, value in state["state"].get(i, {}).items():
                if value.dim():
                    own = cut(value, parameter, torch.float32)
                    self._safe.safe_set_local_optimizer_state(parameter, own, name)
        for i, value in state.get("masters", {}).items():
            own = cut(value, self._parameters[i], torch.float32)
            self._safe.safe_set_local_fp32_param(self._parameters[i], own)

    # ------------------------------------------------------------------------------------------------ the module

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside, every parameter is whole and DeepSpeed's hooks are off."""
        if self._whole:
            yield
            return
        from deepspeed.runtime.zero import unwrap_model_for_generation

        self.release()
        self._whole = True
        try:
            with unwrap_model_for_generation(self._engine):
                yield
        finally:
            self._whole = False

    def release(self) -> None:
        """Free all gathered parameters and wait for pending gathers, so that slices may be overwritten."""
        self._engine.empty_partition_cache()


def engine_of(root: nn.Module) -> Zero3 | None:
    """The engine of a partitioned module; None for any other."""
    return vars(root).get(_ENGINE)


# -------------------------------------------------------------------------------------------------- slices


def is_partitioned(tensor: Tensor) -> bool:
    """Whether a tensor (any shape) is a partitioned parameter, or a slice that `kept` or `cut` made."""
    return hasattr(tensor, "ds_tensor") or hasattr(tensor, _OF)


def kept(parameter: Any) -> Tensor:
    """A copy of this rank's flat slice [n] of a parameter."""
    return _marked(parameter.ds_tensor.detach().clone(), parameter)


def cut(tensor: Tensor, parameter: Any, dtype: torch.dtype | None = None) -> Tensor:
    """This rank's flat slice [n] of a whole tensor of `parameter`'s own shape; the last slices end in zeros."""
    like = parameter.ds_tensor
    out = torch.zeros(like.numel(), device=like.device, dtype=dtype or like.dtype)
    start = torch.distributed.get_rank() * like.numel()
    mine = tensor.detach().flatten()[start : start + like.numel()]
    out[: mine.numel()] = mine.to(out.device, out.dtype)
    return _marked(out, parameter)


def whole(tensor: Any) -> Tensor:
    """A partitioned parameter, or the slices [n] of one, gathered in its own shape and detached. A collective."""
    parameter = getattr(tensor, _OF, tensor)
    mine = (parameter.ds_tensor if parameter is tensor else tensor).detach()
    parts = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, mine)
    return torch.cat(parts)[: parameter.ds_numel].view(parameter.ds_shape)


def overwrite(parameter: Any, own: Tensor, lasting: bool) -> None:
    """Overwrite this rank's slice [n] of a parameter. lasting: also in the float32 copy that the optimizer updates."""
    parameter.ds_tensor.copy_(own)
    if lasting:
        import deepspeed

        deepspeed.utils.safe_set_local_fp32_param(parameter, own.float())


def _marked(slice_: Tensor, parameter: Any) -> Tensor:
    setattr(slice_, _OF, parameter)
    return slice_


# -------------------------------------------------------------------------------------------------- gradients


class _Joined(torch.autograd.Function):
    """The identity on several tensors. A backward from any of them then runs through all of them (with zeros)."""

    @staticmethod
    def forward(ctx: Any, counters: list[tuple[Any, int, int]], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.counters = counters
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        for module, gathers, releases in ctx.counters:
            module.applied_pre_backward_ref_cnt, module.ds_grads_remaining = gathers, releases
        return (None, *gradients)


def joined(root: nn.Module, tensors: list[Tensor]) -> list[Tensor]:
    """The same outputs (any shape), tied together so that a backward from any of them visits the same modules in the same order.

    Modules gather their parameters in the backward, a collective, so all ranks must visit the same ones. Several
    backwards may follow one forward: DeepSpeed's counters, made for one, are set back before each.
    """
    differentiable = [i for i, tensor in enumerate(tensors) if tensor.requires_grad]
    if not differentiable:
        return tensors
    counters = [
        (module, module.applied_pre_backward_ref_cnt, getattr(module, "ds_grads_remaining", 0))
        for module in root.modules()
        if "applied_pre_backward_ref_cnt" in vars(module)
    ]
    out = list(tensors)
    for i, tensor in zip(differentiable, _Joined.apply(counters, *(tensors[i] for i in differentiable)), strict=True):
        out[i] = tensor
    return out
