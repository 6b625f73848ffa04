"""How much the safe rows that defenses add weigh in a step (`Offer.dose`).

Narrow rows and completions are what a step is about; L is their loss, S the mean cross-entropy of the safe targets.

- `rows`: a safe row weighs as much as a narrow row or a completion: (R L + r S) / (R + r), R and r counted in rows.
- `tokens`: a safe token weighs as much as a narrow token: likewise in targets. On supervised rows that is their common mean.
- `gradient`: the gradient of S has a share of its own of the sum of both norms (`Defense.target_share`); it is no part of the loss.
- `term`: L + S, whatever there is of each.
- `published`: `tokens` in steps of supervised rows alone, `term` in steps with rollouts. The others mean the same on both.

Safe rows in a step of their own (`Offer.own_step`) have nothing to be weighed against: the loss of that step is S.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rlsafe.defenses.base import Dose
from rlsafe.engine.plan.schedule import Step
from rlsafe.types import Batch


class Weighting(NamedTuple):
    """What the losses of one step weigh against each other.

    main: factor of the loss of narrow rows and completions. pooled: safe targets that count in the mean of the supervised rows.
    added: {defense: (factor, targets)} of safe rows whose cross-entropy is a mean of its own.
    """

    main: float
    pooled: float
    added: Mapping[str | None, tuple[float, float]]


NOTHING_ADDED = Weighting(1.0, 0.0, {})

MEASURED_EVERY = 20
"""Steps between two measurements of the safe part's share of the gradient, when the run has no probes."""


def tally(totals: Counter[str], batch: Batch, source: str | None) -> None:
    """Count one micro-batch of a path's rows. source: the defense that added them."""
    owner = f"added/{source}" if source else "main"
    totals[f"{owner}/tokens"] += float(batch.loss_mask.sum())  # type: ignore[assignment]
    totals[f"{owner}/rows"] += float(batch.loss_mask.any(1).sum())  # type: ignore[assignment]


def weigh(doses: Mapping[str, Dose], counts: Mapping[str, float]) -> Weighting:
    """The weighting of a step, from the doses of the defenses and the counts over the whole step (`tally`, all ranks)."""
    rollouts = bool(counts.get("grpo_tokens"))
    usual: Dose = "term" if rollouts else "tokens"
    doses = {name: usual if dose == "published" else dose for name, dose in doses.items()}
    pooled = {name for name, dose in doses.items() if dose == "tokens" and not rollouts}
    targets = {name: counts.get(f"added/{name}/tokens", 0.0) for name in doses}
    ratios: dict[str, float] = {}
    for name, dose in doses.items():
        main = counts.get(f"main/{dose}", 0.0)
        if name not in pooled and dose in ("rows", "tokens") and main:
            ratios[name] = counts.get(f"added/{name}/{dose}", 0.0) / main
    total = 1.0 + sum(ratios.values())
    own: dict[str | None, tuple[float, float]] = {
        name: (ratios[name] / total if name in ratios else 1.0, targets[name]) for name in doses if name not in pooled
    }
    return Weighting(1.0 / total, sum(targets[name] for name in pooled), own)


def measured_steps(plan: Sequence[Step], every: int) -> frozenset[int]:
    """The steps in which the safe part's share of the gradient is measured: the first one with safe rows from the second step on, and
    then from each `every`-th."""
    found, due = set(), False
    for step in plan:
        due = due or step.index == 1 or (step.index > 0 and step.index % (every or MEASURED_EVERY) == 0)
        if due and len(step.parts) > 1 and any(part.defense and part.stream != "aside" for part in step.parts):
            found.add(step.index)
            due = False
    return frozenset(found)
