"""The gradient lever: what a step's gradient consists of, apart where a defense asks, and the defenses' changes to it.

Nothing here runs unless a defense overrides `gradients`, has a `target_share`, or has its dose measured. One that looks only at the
whole step costs no backward. Parts are kept apart by pointing every parameter's `.grad` at the part's own tensors while its terms are
run backward: one forward as always, and one more backward for each further part in the same micro-batch (`retain_graph`). DDP then
adds ranks up here, once per part, instead of under the last backward; FSDP2 reduces in each backward, so all ranks take the same
parts in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from rlsafe.config import UserError
from rlsafe.defenses import DefenseStack
from rlsafe.defenses.vectors import Named, norm
from rlsafe.engine.plan.schedule import Step
from rlsafe.engine.train.distributed import offloads, union
from rlsafe.engine.train.loss import Micro, NotFinite
from rlsafe.engine.train.state import Components
from rlsafe.policy import Policy
from rlsafe.policy.sharding import shard_like, whole
from rlsafe.policy.zero3 import engine_of

REST = "rest"  # all that no defense asked to see apart
ADDED = "added/"  # safe rows whose share is measured
SAFE = "safe"


def check(stack: DefenseStack, policy: Policy) -> None:
    """UserError for a defense that changes gradients, where no process has them whole."""
    if not _whole_here(policy) and stack.reshaping:
        where = "DeepSpeed ZeRO-3" if engine_of(policy.core) else "FSDP2 with fsdp_offload_params"
        raise UserError(
            f"defense {stack.reshaping[0].name!r} changes gradients, which are not whole under {where}; expected "
            "configs/accelerate/ddp.yaml or fsdp2.yaml"
        )


def _whole_here(policy: Policy) -> bool:
    """Whether a process can have gradients whole."""
    return not (policy.is_sharded and (engine_of(policy.core) or offloads()))


class PartGradients:
    """One step's gradient in parts."""

    def __init__(self, run: Components, measured: Collection[str] = ()):
        self._run = run
        self._measured = set(measured)
        self._parameters = run.policy.trainable()
        self._own = run.stack.own
        self._wanted = {part for d in run.stack.reshaping for part in d.apart} - {"own"}
        self._kept: dict[str, dict[str, Tensor | None]] = {}

    @classmethod
    def of(cls, run: Components, step: Step) -> PartGradients | None:
        """None when no defense asks for parts and none is to be measured: one backward of the whole loss will do."""
        apart = any(defense.apart for defense in run.stack.reshaping)
        measured = set()
        if step.index in run.measured and _whole_here(run.policy):
            measured = {part.defense for part in step.parts if part.defense and part.stream != "aside"} - run.stack.own
        return cls(run, measured) if run.stack.own or apart or measured else None

    def backward(self, micro: Micro, total: Tensor, terms: Mapping[str, Tensor]) -> None:
        """Add one micro-batch to the parts. total: its loss (scalar); terms: what it is the sum of, on this rank; none in a dummy."""
        sharded, world = self._run.policy.is_sharded, self._run.accelerator.num_processes
        sums: dict[str, Tensor] = {}
        for name, term in terms.items():
            part = self._part(micro, name)
            sums[part] = sums[part] + term if part in sums else term
        names = sorted(union(sums or [REST], self._run.accelerator) if sharded else sums or [REST])
        for number, name in enumerate(names):
            loss = sums.get(name, 0.0 * total) * (world if sharded else 1)  # FSDP2 averages, `finish` adds
            mine = self._kept.setdefault(name, dict.fromkeys(self._parameters))
            for key, parameter in self._parameters.items():
                parameter.grad = mine[key]
            self._run.accelerator.backward(loss, retain_graph=number + 1 < len(names))
            for key, parameter in self._parameters.items():
                mine[key], parameter.grad = parameter.grad, None

    def _part(self, micro: Micro, term: str) -> str:
        if micro.source in self._own and not term.startswith("defense/"):
            return f"own/{micro.source}"
        if micro.source in self._measured and not term.startswith("defense/"):
            return f"{ADDED}{micro.source}"
        if not term.startswith("defense/"):
            return micro.batch.where.stream if micro.batch.where.stream in self._wanted else REST
        if owner := next((name for name in self._own if term.startswith(f"defense/{name}/")), None):
            return f"own/{owner}"
        return "penalty" if "penalty" in self._wanted else REST

    def shows(self, part: str) -> bool:
        """Whether a defense wants to see this part."""
        return part in self._wanted

    def finish(self) -> dict[str, dict[str, Tensor]]:
        """{part: {parameter: gradient in its own shape}} over all ranks; the parameters' `.grad` is then their sum without `own`."""
        accelerator, sharded = self._run.accelerator, self._run.policy.is_sharded
        names = sorted(union(self._kept, accelerator))
        parts: dict[str, dict[str, Tensor]] = {}
        for name in names:
            mine = self._kept.get(name, {})
            if accelerator.num_processes > 1 and not sharded:
                parts[name] = _added(mine, self._parameters, self._run)
            else:
                parts[name] = {key: grad for key, grad in mine.items() if grad is not None}
        for key, parameter in self._parameters.items():
            of_step = [part[key] for name, part in parts.items() if key in part and not name.startswith("own/")]
            if of_step:
                parameter.grad = of_step[0].clone()
                for gradient in of_step[1:]:
                    parameter.grad += gradient
            else:  # a step of nothing but an own penalty
                parameter.grad = torch.zeros_like(parameter) if any(key in part for part in parts.values()) else None
        return {
            name: {key: whole(part[key]) if key in part else _zeros(p) for key, p in self._parameters.items()}
            for name, part in parts.items()
            if name != REST
        }


def _added(mine: Mapping[str, Tensor | None], parameters: Mapping[str, Tensor], run: Components) -> dict[str, Tensor]:
    """One part summed over the ranks of DDP, in one collective."""
    given = [(mine.get(key), p) for key, p in parameters.items()]
    flat = torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in given])
    flat = run.accelerator.reduce(flat, reduction="sum")
    pieces = flat.split([p.numel() for p in parameters.values()])
    return {key: piece.view_as(p) for (key, p), piece in zip(parameters.items(), pieces, strict=True)}


def _zeros(parameter: Tensor) -> Tensor:
    return torch.zeros(parameter.shape, dtype=parameter.dtype, device=parameter.device)


def _check_finite(step: Named, parts: Mapping[str, Named]) -> None:
    """NotFinite before a defense decomposes, or remembers, what is NaN or infinite."""
    for of, gradient in {"": step, **{f" of {name}": part for name, part in parts.items()}}.items():
        if not math.isfinite(length := norm(gradient)):
            raise NotFinite(f"the gradient norm{of} is {length}")


@torch.no_grad()
def edit(run: Components, parts: PartGradients | None) -> dict[str, float]:
    """Let the defenses change the step's gradient; the parameters' `.grad` is then what they made of it. Gives metrics.

    NotFinite, the same on all ranks, when it or a part of it is not; no defense has seen it then."""
    seen = parts.finish() if parts else {}
    given = {key: p for key, p in run.policy.trainable().items() if p.grad is not None}
    step = {key: whole(p.grad) for key, p in given.items()}  # type: ignore[arg-type]
    _check_finite(step, seen)
    metrics = {}
    for name in [name for name in seen if name.startswith(ADDED)]:
        added = seen.pop(name)
        own, rest = norm(added), norm({key: value - added[key] for key, value in step.items()})
        metrics[f"defense/{name.removeprefix(ADDED)}/grad_share"] = own / (own + rest) if own else 0.0
        if parts and parts.shows(SAFE):  # kept apart to be measured, these rows are safe rows all the same
            others = seen.get(SAFE)
            seen[SAFE] = {key: value + others[key] for key, value in added.items()} if others else added
    metrics |= run.stack.gradients(run.policy, step, seen)
    for key, parameter in given.items():
        parameter.grad = shard_like(step[key], parameter) if run.policy.is_sharded else step[key]
    return metrics
