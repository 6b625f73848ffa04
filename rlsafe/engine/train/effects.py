"""What each defense really did, measured; and the check that none silently did nothing (docs/architecture.md)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from accelerate.utils import gather_object
from torch import Tensor

from rlsafe.defenses import Defense, DefenseStack
from rlsafe.engine.plan.schedule import Step
from rlsafe.types import RunError

Counts = defaultdict[str, Counter[str]]


class EffectLog:
    """Collects what each defense did in each step, and stops the run for one that has done nothing.

    A defense's penalty and its other hooks are judged once each: after `check_after` steps on every path in which they had something to
    act on, rows that the penalty is of, or a part with a stream of the hooks. A path is not waited for once every kind of part on it
    has come as often, or comes no more. What is left is judged at the run's end. Steps in which the defense is off or still waits for
    its reference do not count. By then its penalty must have had a non-zero gradient, its prompt or activation hook a non-zero measure
    of its own. A weight or data defense that changed nothing gives a warning only: a threshold may rightly select nothing.
    """

    def __init__(self, stack: DefenseStack, plan: Sequence[Step], check_after: int, warn: Callable[[str], None]):
        self.stack, self.check_after, self.warn = stack, check_after, warn
        self.steps: Counts = defaultdict(Counter)  # defense -> path -> steps while ready
        self.met: Counts = defaultdict(Counter)  # defense -> kind of part (`_kinds`) -> of these steps, those with one
        self.acted: Counts = defaultdict(Counter)  # lever -> path -> of these steps, those with something to act on
        self.alive: set[str] = set()  # levers: "name" or "name/penalty"
        self.judged: set[str] = set()  # levers
        self.index = -1  # of the last step
        self.with_rows: set[str] = set()  # defenses whose penalty has rows in the present step
        self.last = {  # defense -> kind of part -> the last step that has one while the defense acts
            defense.name: {
                kind: step.index
                for step in plan
                if (step.index, step.phase) in defense.when
                for kind in _kinds(step, defense)
            }
            for defense in stack
        }

    EMPTY: ClassVar[dict[str, Any]] = {"steps": {}, "met": {}, "acted": {}, "alive": [], "judged": []}
    """The state of a run without defenses."""

    def seen(self, names: Iterable[str]) -> None:
        """Note that these hooks ("name", or "name/penalty") had an effect, on this rank or another."""
        self.alive |= set(names)

    def counted(self, counts: Mapping[str, float]) -> None:
        """Note whose penalty has rows in the present step; counts: `loss.count`, over all ranks."""
        self.with_rows = {d.name for d in self.stack.penalized if counts.get(f"defense/{d.name}")}

    def due(self, step: int, every: int) -> bool:
        """Whether to measure gradient shares in this step: at probes, in the second step, and in every step until each penalty has
        shown a gradient or was judged."""
        return (
            step == 1
            or (every > 0 and step % every == 0)
            or any(f"{d.name}/penalty" not in self.judged | self.alive for d in self.stack.penalized)
        )

    def gradients(self, terms: Mapping[str, Tensor], parameters: list[Tensor]) -> dict[str, float]:
        """{defense/NAME/grad_share: share of the penalty's gradient norm in the sum of all terms' norms} in one micro-batch.

        terms: {name: scalar with its graph}, such as sft, defense/kl/kl; parameters: each in its own shape.
        """
        norms = {name: _norm(term, parameters) for name, term in terms.items()}
        total = sum(norms.values())
        shares = {}
        for defense in self.stack.penalized:
            own = sum(norm for name, norm in norms.items() if name.startswith(f"defense/{defense.name}/"))
            if any(name.startswith(f"defense/{defense.name}/") for name in norms):
                if len(norms) > 1:  # rows set aside have nothing else in their micro-batch
                    shares[f"defense/{defense.name}/grad_share"] = own / total if total else 0.0
                if own > 0:
                    self.alive.add(f"{defense.name}/penalty")
        return shares

    def step(self, step: Step, rows_added: Mapping[str, int]) -> dict[str, float]:
        """{defense/NAME/quantity: value} of what every defense did in one step; rows_added: rows that the plan had from each."""
        metrics: dict[str, float] = {}
        self.index = step.index
        for defense in self.stack:
            if defense.name not in self.stack.waiting | self.stack.off:
                self._ready(step, defense)
            measured = dict(defense.effect())
            if overrides(defense, "prompt"):
                measured["prompts_changed"] = float(self.stack.prompts_changed.pop(defense.name, 0))
            if defense.offer() is not None:
                measured.setdefault(
                    "rows_added", float(rows_added.get(defense.name, 0))
                )  # planned, unless it knows better
            if any(value for quantity, value in measured.items() if not quantity.startswith("seen_")):
                self.alive.add(defense.name)
            metrics |= {f"defense/{defense.name}/{quantity}": value for quantity, value in measured.items()}
        return metrics

    def _ready(self, step: Step, defense: Defense) -> None:
        """Count a step in which the defense is there."""
        name = defense.name
        self.steps[name][step.path] += 1
        self.met[name].update(_kinds(step, defense))
        if name in self.with_rows:
            self.acted[f"{name}/penalty"][step.path] += 1
        if any(part.stream in defense.streams for part in step.parts):
            self.acted[name][step.path] += 1

    def check(self, at_end: bool = False) -> None:
        """RunError naming a defense whose effect is still exactly zero when it is judged."""
        if not self.check_after:
            return
        for defense in self.stack:
            ready = self.steps[defense.name].total()
            for lever in _levers(defense):
                acted = self.acted[lever].total()
                # In a single step a penalty may rightly have no gradient: policy and reference are one at the start.
                due = (at_end or self._settled(defense.name, lever)) and (ready != 1 or acted >= self.check_after)
                if not due or lever in self.judged:
                    continue
                if lever not in self.alive:
                    problem = _problem(defense, lever, ready, acted)
                    if not _softly(defense, lever):
                        raise RunError(
                            f"defense {defense.name!r} {problem}{f' after {acted or ready} steps' if ready else ''}; a defense that "
                            "silently does nothing is not a result (track.check_after sets when this is checked, 0 = never)"
                        )
                    if not at_end:
                        continue  # its moment may come later in the run
                    self.warn(f"defense {defense.name!r} {problem}")
                self.judged.add(lever)

    def _settled(self, name: str, lever: str) -> bool:
        """Whether the lever had `check_after` steps, or as many chances, on every path."""
        acted, met = self.acted[lever], self.met[name]
        return all(
            acted[kind.partition("/")[0]] >= self.check_after or met[kind] >= self.check_after or self.index >= last
            for kind, last in self.last[name].items()
        )

    def _counts(self) -> dict[str, Counts]:
        return {"steps": self.steps, "met": self.met, "acted": self.acted}

    def state_dict(self) -> dict[str, object]:
        """What a resumed run needs to judge the same levers at the same steps."""
        return {
            **{
                name: {key: dict(counter) for key, counter in counts.items()} for name, counts in self._counts().items()
            },
            "alive": sorted(self.alive),
            "judged": sorted(self.judged),
        }

    def load_state_dict(self, state: Mapping) -> None:
        """The inverse of `state_dict`."""
        for name, counts in self._counts().items():
            counts.update({key: Counter(counter) for key, counter in state.get(name, {}).items()})
        self.alive, self.judged = set(state["alive"]), set(state["judged"])


def overrides(defense: Defense, *hooks: str) -> bool:
    """Whether the class defines any of these hooks itself."""
    return any(getattr(type(defense), hook) is not getattr(Defense, hook) for hook in hooks)


def _kinds(step: Step, defense: Defense) -> set[str]:
    """ "path/stream/source" of each part of a step that this defense may see: rows set aside are their owner's alone."""
    return {
        f"{step.path}/{part.stream}/{part.defense or ''}"
        for part in step.parts
        if part.stream != "aside" or part.defense == defense.name
    }


def _levers(defense: Defense) -> list[str]:
    """What is judged of a defense by itself, as `alive` has it."""
    return [f"{defense.name}/penalty"] * overrides(defense, "penalty") + [defense.name] * bool(_hooks(defense))


def _hooks(defense: Defense) -> list[str]:
    """Its levers beside the penalty of which an effect is measured."""
    hooks = ["prompt"] * overrides(defense, "prompt") + ["offer"] * (defense.offer() is not None)
    if overrides(defense, "effect"):  # these are measured by the defense itself
        hooks += [lever for lever in ("activations", "advantages", "gradients", "weights") if overrides(defense, lever)]
    return hooks


def _problem(defense: Defense, lever: str, ready: int, acted: int) -> str:
    if not ready:
        return "waited for its reference in all steps in which it was to act"
    if lever == defense.name:
        return f"had no effect through its {' and '.join(_hooks(defense))} hook"
    return "gave a penalty without any gradient" if acted else "had no rows for its penalty"


def _softly(defense: Defense, lever: str) -> bool:
    """Whether it is only worth a warning that the lever did nothing."""
    if overrides(defense, "gradients", "advantages"):
        return lever == defense.name
    return (overrides(defense, "weights") or defense.offer() is not None) and not overrides(defense, "penalty")


def _norm(term: Tensor, parameters: list[Tensor]) -> float:
    if not term.requires_grad:
        return 0.0
    gradients = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
    return float(sum(g.double().square().sum() for g in gradients if g is not None) ** 0.5)


def gradient_shares(
    effects: EffectLog, terms: Mapping[str, Tensor], total: Tensor, leaves: list[Tensor], sharded: bool
) -> dict[str, float]:
    """`EffectLog.gradients` of one micro-batch with loss `total` (scalar); {} without terms (scalars). leaves: the parameters, each
    in its own shape.

    In a sharded model a backward is a collective, so a rank with fewer terms runs further backwards whose result is dropped.
    """
    most = max(gather_object([len(terms)])) if sharded else 0
    shares = effects.gradients(terms, leaves) if terms else {}
    for _ in range(most - len(terms)):
        torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)
    return shares
