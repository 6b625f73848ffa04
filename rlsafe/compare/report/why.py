"""Analyses beyond the verdicts: when misalignment sets in during training, how much reward a prompt leaves to learn, and whether
misalignment returns in further training without the defense."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from rlsafe.compare.report.pages import prompts
from rlsafe.compare.verdicts.arms import MEASURES, Rate, rate_arms, summarise
from rlsafe.compare.verdicts.results import Result, Results
from rlsafe.compare.verdicts.verdicts import PathTable
from rlsafe.defenses.registry import parse
from rlsafe.evaluate.statistics import clustered_wilson

# ------------------------------------------------------------------------------------------------ onset


@dataclass(frozen=True)
class Onset:
    """The step at which emergent misalignment sets in.

    step: of all seeds' answers together; None = not within the run. seeds: {seed: step from that run's answers alone}, which
    is later or None since there are fewer answers. projection: mean projection of the answers on the persona vector at the
    first step, at the onset (None without an onset) and at the last step; () without a vector.
    """

    label: str
    threshold: float
    step: int | None
    seeds: dict[int, int | None]
    last_probe: int
    projection: tuple[float, float | None, float] | tuple[()] = ()


def onsets(results: Results, table: PathTable) -> list[Onset]:
    """The onset of every label that was probed.

    Emergent misalignment has set in at the first probe at which the lower end of the 95% interval of general misalignment
    (answers of all seeds, clustered by question) lies above the upper end of the untrained model's interval. The threshold is
    from the final evaluation, which asks more questions than a probe does.
    """
    untrained = table.rows.get("untrained")
    if untrained is None or "general" not in untrained.rates:
        return []
    threshold = untrained.rates["general"].high
    found = []
    for label in [*table.defenses, "aligned"]:
        cells = results.of("aligned" if label == "aligned" else "narrow", table.model, table.path, label)
        steps = sorted({probed.step for cell in cells for probed in cell.probes if probed.set == "general"})
        if not steps:
            continue
        step = _first(cells, steps, threshold)
        seeds = {cell.seed: _first([cell], steps, threshold) for cell in cells}
        found.append(Onset(label, threshold, step, seeds, steps[-1], _projection(cells, step)))
    return found


def onset_step(cell: Result, threshold: float, questions: str = "general") -> int | None:
    """The onset in one run, by the rule of `onsets`."""
    steps = sorted({probed.step for probed in cell.probes if probed.set == questions})
    return _first([cell], steps, threshold, questions)


def _first(cells: Sequence[Result], steps: Sequence[int], threshold: float, questions: str = "general") -> int | None:
    return next((step for step in steps if _lower(cells, step, questions) > threshold), None)


def _lower(cells: Sequence[Result], step: int, questions: str) -> float:
    """Lower end of the 95% interval of misalignment in the probes of a step."""
    bad: dict[str, int] = defaultdict(int)
    asked: dict[str, int] = defaultdict(int)
    for probed in (p for cell in cells for p in cell.probes):
        if probed.step == step and probed.set == questions and probed.judgement.outcome != "unscored":
            asked[probed.question] += 1
            bad[probed.question] += probed.judgement.misaligned
    return clustered_wilson([bad[q] for q in asked], list(asked.values()))[0] if asked else 0.0


def _projection(cells: Sequence[Result], step: int | None) -> tuple[float, float | None, float] | tuple[()]:
    by_step: dict[int, list[float]] = defaultdict(list)
    for cell in cells:
        for at, value in cell.curve("projection"):
            by_step[at].append(value)
    if not by_step:
        return ()
    means = {at: mean(values) for at, values in sorted(by_step.items())}
    return next(iter(means.values())), means.get(step) if step is not None else None, list(means.values())[-1]


# ------------------------------------------------------------------------------------------------ dose and response


@dataclass(frozen=True)
class Dose:
    """One wording of an inoculation prompt (or none) under GRPO: the reward at the start, per seed; the share of groups whose
    completions all get the same reward, over the first tenth of the steps and over all; the rates without the prompt."""

    label: str
    rewards: dict[int, float]
    flat_first: float | None
    flat: float | None
    indomain: Rate
    general: Rate

    @property
    def reward(self) -> float:
        return mean(self.rewards.values())


def doses(results: Results, table: PathTable) -> list[Dose]:
    """Every run with an inoculation prompt and a reward, and the undefended one; [] when no prompt was tried.

    The first reward is the mean over the first twentieth of the GRPO steps: after a supervised warm-up it is that of the
    warmed-up model under the prompt.
    """
    found = []
    for label in table.defenses:
        cells = results.of("narrow", table.model, table.path, label)
        names = {name for cell in cells for entry in cell.config.defenses for name, _ in parse(entry)}
        rewards = {cell.seed: first for cell in cells if (first := cell.rewards()[0]) is not None}
        row = table.rows[label]
        if (label == "none" or "inoculation" in names) and rewards and {"general", "indomain"} <= row.rates.keys():
            first, whole = flat_share(cells, 0.1), flat_share(cells)
            found.append(Dose(label, rewards, first, whole, row.rates["indomain"], row.rates["general"]))
    return sorted(found, key=lambda dose: dose.reward) if len(found) > 1 else []


def flat_share(cells: Sequence[Result], part: float = 1.0) -> float | None:
    """Share of GRPO groups without any spread of rewards, over the first `part` of the GRPO steps; None without GRPO."""
    flat, groups = 0.0, 0.0
    for cell in cells:
        values = [value for _, value in cell.curve("zero_variance_groups")]
        count = max(1, round(part * len(values)))
        if values:
            flat += sum(values[:count])
            groups += prompts(cell) * count / len(values)
    return flat / groups if groups else None


# ------------------------------------------------------------------------------------------------ relapse


@dataclass(frozen=True)
class Relapse:
    """Rates before and after undefended steps: {rate: (before, after)}. `untrained`: those steps alone."""

    label: str
    steps: int
    rates: dict[str, tuple[Rate, Rate]]


def relapses(results: Results, table: PathTable) -> list[Relapse]:
    """The relapse of every label whose runs were trained further without the defense, for each number of steps apart, the fewest
    first."""
    cells = results.of("relapse", table.model, table.path)
    found = []
    for steps in sorted({cell.config.schedule.steps for cell in cells}):
        for label in ("untrained", *table.defenses):
            after = [cell for cell in cells if (cell.defense, cell.config.schedule.steps) == (label, steps)]
            started = {run.id: run for cell in after if (run := results.before(cell))}  # not of seeds without a relapse
            rates = {}
            for name in ("general", "indomain", "general_incoherent"):
                before, later = _rate(label, list(started.values()), name), _rate("relapse", after, name)
                if before and later:
                    rates[name] = (before, later)
            if rates:
                found.append(Relapse(label, steps, rates))
    return found


def _rate(label: str, cells: Sequence[Result], name: str) -> Rate | None:
    """One of MEASURES over cells; those called `untrained` are no sample of seeds, as further training of that model is."""
    arm = rate_arms({label: cells}, name).get(label)
    return summarise(arm, cells, MEASURES[name][0]) if arm else None
