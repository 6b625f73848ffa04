"""What each defense really did, measured; and the check that none silently did nothing (docs/architecture.md)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from accelerate.utils import gather_object
from torch import Tensor

from rlsafe.defenses import Defense, DefenseStack
from rlsafe.types import RunError


class EffectLog:
    """Collects what each defense did in each step, and stops the run for one that has done nothing.

    A defense is judged once, after `check_after` steps on every path of the run, at the latest at the run's end. Steps in which it
    still waited for its reference do not count. By then its penalty must have had a non-zero gradient, its prompt or activation hook
    a non-zero measure of its own. A weight or data defense that changed nothing gives a warning only: a threshold may rightly
    select nothing.
    """

    def __init__(self, stack: DefenseStack, paths: Iterable[str], check_after: int, warn: Callable[[str], None]):
        self.stack, self.paths, self.check_after, self.warn = stack, set(paths), check_after, warn
        self.steps: dict[str, Counter[str]] = defaultdict(Counter)  # defense -> path -> steps while ready
        self.alive: set[str] = set()  # "name" or "name/penalty"
        self.judged: set[str] = set()

    EMPTY: ClassVar[dict[str, Any]] = {"steps": {}, "alive": [], "judged": []}
    """The state of a run without defenses."""

    def seen(self, names: Iterable[str]) -> None:
        """Note that these hooks ("name", or "name/penalty") had an effect, on this rank or another."""
        self.alive |= set(names)

    def due(self, step: int, every: int) -> bool:
        """Whether to measure gradient shares in this step: at probes, in the second step, and in every step until each penalty has
        shown a gradient or was judged."""
        return (
            step == 1
            or (every > 0 and step % every == 0)
            or any(
                name not in self.judged and f"{name}/penalty" not in self.alive
                for name in (d.name for d in self.stack.penalized)
            )
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

    def step(self, path: str, rows_added: Mapping[str, int]) -> dict[str, float]:
        """{defense/NAME/quantity: value} of what every defense did in one step; rows_added: rows that the plan had from each."""
        metrics: dict[str, float] = {}
        for defense in self.stack:
            if defense.name not in self.stack.waiting | self.stack.off:
                self.steps[defense.name][path] += 1
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

    def check(self, at_end: bool = False) -> None:
        """RunError naming a defense whose effect is still exactly zero when it is judged."""
        if not self.check_after:
            return
        for defense in self.stack:
            steps = self.steps[defense.name]
            due = all(steps[path] >= self.check_after for path in self.paths) or (at_end and sum(steps.values()) > 1)
            if not due or defense.name in self.judged:
                continue
            if problem := self._problem(defense):
                if self._softly(defense, problem):
                    if not at_end:
                        continue  # its moment may come later in the run
                    self.warn(f"defense {defense.name!r} {problem}")
                else:
                    raise RunError(
                        f"defense {defense.name!r} {problem} after {sum(steps.values())} steps; a defense that silently does "
                        "nothing is not a result (track.check_after sets when this is checked, 0 = never)"
                    )
            self.judged.add(defense.name)

    def _problem(self, defense: Defense) -> str | None:
        if overrides(defense, "penalty") and f"{defense.name}/penalty" not in self.alive:
            return "gave a penalty without any gradient"
        others = ["prompt"] * overrides(defense, "prompt") + ["offer"] * (defense.offer() is not None)
        if overrides(defense, "effect"):  # these are measured by the defense itself
            others += [
                lever for lever in ("activations", "advantages", "gradients", "weights") if overrides(defense, lever)
            ]
        if others and defense.name not in self.alive:
            return f"had no effect through its {' and '.join(others)} hook"
        return None

    def _softly(self, defense: Defense, problem: str) -> bool:
        """Whether the problem is only worth a warning."""
        if overrides(defense, "gradients", "advantages"):
            return "penalty" not in problem
        return (overrides(defense, "weights") or defense.offer() is not None) and not overrides(defense, "penalty")

    def state_dict(self) -> dict[str, object]:
        """What a resumed run needs to judge the same levers at the same steps."""
        return {
            "steps": {name: dict(counter) for name, counter in self.steps.items()},
            "alive": sorted(self.alive),
            "judged": sorted(self.judged),
        }

    def load_state_dict(self, state: Mapping) -> None:
        """The inverse of `state_dict`."""
        self.steps = defaultdict(Counter, {name: Counter(counter) for name, counter in state["steps"].items()})
        self.alive, self.judged = set(state["alive"]), set(state["judged"])


def overrides(defense: Defense, *hooks: str) -> bool:
    """Whether the class defines any of these hooks itself."""
    return any(getattr(type(defense), hook) is not getattr(Defense, hook) for hook in hooks)


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
