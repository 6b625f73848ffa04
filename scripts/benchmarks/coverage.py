"""How often the intervals of a comparison hold the truth, in simulated worlds with domain, question and seed effects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from table import Result

from rlsafe.evaluate.contrasts import Arm, Sample, rate_interval, share_difference

DOMAINS = 6


@dataclass(frozen=True)
class World:
    """Beta-binomial answers.

    A question's rate is Beta around its domain's mean with correlation `icc`; a seed shifts all log-odds by N(0, seed), those of each
    domain by another N(0, seed_domain). Arms share the questions (their quantiles), and the seeds' shifts in part.

    questions: of each domain. answers: to each question. spread: how far the domains' log-odds lie apart, about.
    """

    name: str
    questions: int = 20
    answers: int = 1
    icc: float = 0.2
    spread: float = 0.7
    seed: float = 0.2
    seed_domain: float = 0.1


WORLDS = (
    World("seeds alike", seed=0.0, seed_domain=0.0),
    World("seeds differ a little", seed=0.1),
    World("seeds differ"),
    World("seeds differ much", seed=0.6),
    World("seeds differ by domain", seed=0.1, seed_domain=0.4),
    World("questions alike", icc=0.0),
    World("questions differ much", icc=0.5),
    World("4 questions, 10 answers", questions=4, answers=10, icc=0.3),
    World("120 questions", questions=120),
)
ARMS = {"untrained": 0.02, "none": 0.35, "kl": 0.06, "weak": 0.2, "none-2": 0.5, "kl-2": 0.2}
GRID = 200  # quantiles at which a question's rate is tabulated


class Drawn:
    """A world's truths, and samples of it. tables[label]: [domain, quantile] log-odds of a question's rate."""

    def __init__(self, world: World):
        from scipy.special import betaincinv, expit, logit

        self.world = world
        nodes, weights = np.polynomial.hermite_e.hermegauss(31)
        shifts = float(np.hypot(world.seed, world.seed_domain)) * nodes
        at = (np.arange(GRID) + 0.5) / GRID
        self.tables, self.truth = {}, {}
        for label, rate in ARMS.items():
            means = expit(logit(rate) + world.spread * np.linspace(-1, 1, DOMAINS))[:, None]
            k = 1 / world.icc - 1 if world.icc else 0.0
            p = betaincinv(means * k, (1 - means) * k, at) if k else np.broadcast_to(means, (DOMAINS, GRID))
            self.tables[label] = logit(np.clip(p, 1e-12, 1 - 1e-12))
            moved = shifts if label != "untrained" else np.zeros(1)
            mass = weights / weights.sum() if label != "untrained" else np.ones(1)
            self.truth[label] = float((expit(self.tables[label][..., None] + moved) @ mass).mean())

    def sample(self, rng: np.random.Generator, seeds: int) -> tuple[dict[str, Arm], dict[str, float]]:
        """(arms, the truths that their intervals should hold: with one seed, those of that seed)."""
        from scipy.special import expit

        world, width = self.world, DOMAINS * self.world.questions
        domain = np.repeat(np.arange(DOMAINS), world.questions)
        at = rng.integers(GRID, size=width)
        common = rng.normal(size=(seeds, 1 + DOMAINS))
        arms, truth = {}, {}
        for label in ARMS:
            trained, rows = label != "untrained", seeds if label != "untrained" else 1
            own = 0.8 * rng.normal(size=(seeds, 1 + DOMAINS)) + 0.6 * common
            shift = world.seed * own[:rows, :1] + world.seed_domain * own[:rows, 1:]  # [S, D]
            shift = shift if trained else np.zeros((1, DOMAINS))
            p = expit(self.tables[label][domain, at] + shift[:, domain])
            rates = rng.binomial(world.answers, p) / world.answers
            names = tuple(map(str, domain))
            arms[label] = Arm(rates, rates.size * world.answers, names, tuple(range(rows)), trained)
            of_this = float(expit(self.tables[label] + shift[0][:, None]).mean())
            truth[label] = of_this if seeds == 1 else self.truth[label]
        return arms, truth


def share(truth: dict[str, float], arm: str, none: str = "none") -> float:
    return (truth[arm] - truth["untrained"]) / (truth[none] - truth["untrained"])


QUANTITIES = ("low rate", "high rate", "difference", "prevention", "two defenses", "two paths")


def covered(drawn: Drawn, seeds: int, times: int, seed: int = 0) -> dict[str, float]:
    """Quantity -> how often its 95% interval held the truth."""
    rng = np.random.default_rng(seed)
    hits = dict.fromkeys(QUANTITIES, 0)
    for _ in range(times):
        arms, truth = drawn.sample(rng, seeds)
        sample = Sample(arms)
        bottom = {"none": 1.0, "untrained": -1.0}
        shares = [share(truth, "kl"), share(truth, "weak"), share(truth, "kl-2", "none-2")]
        found = {
            "low rate": (rate_interval(arms["kl"]), truth["kl"]),
            "high rate": (rate_interval(arms["none"]), truth["none"]),
            "difference": (sample.difference("weak", "kl"), truth["weak"] - truth["kl"]),
            "prevention": (sample.ratio({"kl": 1.0, "untrained": -1.0}, bottom)[1], shares[0]),
            "two defenses": (sample.ratio({"weak": 1.0, "kl": -1.0}, bottom)[1], shares[1] - shares[0]),
            "two paths": (
                share_difference(sample, ("kl", "none", "untrained"), ("kl-2", "none-2", "untrained"))[1],
                shares[0] - shares[2],
            ),
        }
        for name, ((low, high), value) in found.items():
            hits[name] += low <= value <= high
    return {name: count / times for name, count in hits.items()}


SEEDS = (1, 3, 5, 10)


def coverage(scratch: Path, quick: bool, rounds: int, draws: Sequence[int] = ()) -> Result:
    """Wanted: .94 to .97 everywhere, for 1, 3, 5 and 10 seeds. draws: of worlds for each of these, () = 400 a round."""
    result = Result("coverage", ["world", "seeds", *QUANTITIES])
    times, worlds = ([200] * 4, WORLDS[2:3]) if quick else ([400 * rounds] * 4, WORLDS)
    times = list(draws) or times
    every = [rate for world in worlds for rate in _rows(result, world, dict(zip(SEEDS, times, strict=True)))]
    error = 2 * (0.95 * 0.05 / min(times)) ** 0.5
    inside = sum(0.94 - error <= rate <= 0.97 + error for rate in every) / len(every)
    result.goal(
        "share of intervals with coverage in .94-.97, give or take the simulation's error",
        inside,
        ">= 0.95",
        inside >= 0.95,
    )
    result.goal("lowest coverage", min(every), ">= 0.92", min(every) >= 0.92)
    drawn = ", ".join(dict.fromkeys(map(str, times)))
    result.notes.append(f"{drawn} worlds drawn for each row; two standard errors of a coverage: {error:.3f} at most")
    return result


def _rows(result: Result, world: World, times: Mapping[int, int]) -> list[float]:
    """times: number of seeds -> worlds drawn."""
    drawn, every = Drawn(world), []
    for count, draws in times.items():
        found = covered(drawn, count, draws)
        result.row([world.name, str(count), *(f"{rate:.3f}".removeprefix("0") for rate in found.values())])
        result.measured.append({"world": vars(world), "seeds": count, "times": draws, "coverage": found})
        every += found.values()
    return every
