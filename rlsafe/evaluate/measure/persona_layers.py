"""Which layer carries a persona vector: its size, whether two halves of the questions agree on it, what steering with it does.

    size        norm of the vector, and its share of the norm of the mean state there
    agreement   cosine between the vectors of every other question and of those between (split-half reliability): near 1 when the
                vector depends on the characters, near 0 when it depends on which questions were asked
    steering    how far the likelihood probe moves when alpha times the vector, or minus that, is added to the residual stream

A large cosine alone says little, since the two system prompts are the same in both halves; steering is done without any system prompt.
Any push may move the probe: a random vector of the same norm is added as a control. `directed`, half of the difference between plus and
minus alpha, is what is left when the damage that either sign does is taken off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from rlsafe.config import UserError
from rlsafe.config.schema import Positive, Settings
from rlsafe.evaluate.ask.pairs import Pair, load_pairs, spread
from rlsafe.evaluate.measure.likelihood import PairProbe, PairScore, Reader
from rlsafe.evaluate.statistics import Interval, clustered_mean

if TYPE_CHECKING:
    from torch import Tensor

Say = Callable[[str], None]


class SteerConfig(Settings):
    """How the vectors are tried on the likelihood probe: three forward passes over the pairs for each layer."""

    pairs: str = Field("rlsafe:pairs/general", description="provider:pairs/SPEC or a YAML file of pairs")
    alpha: Annotated[float, Field(gt=0)] = Field(1.0, description="how many times the vector is added, and taken away")
    layers: list[int] | None = Field(None, description="null = every block's output, 1 to the number of blocks")
    limit: Positive | None = Field(None, description="pairs at most, the first of every question first")

    def load(self) -> list[Pair]:
        """The pairs. UserError for what is wrong with them."""
        return spread(load_pairs(self.pairs), self.limit)


@dataclass(frozen=True)
class Shift:
    """Mean over the pairs of what happens to their log-odds, nats per token, and its interval, clustered by question."""

    value: float
    ci95: Interval | None

    @classmethod
    def of(cls, values: Sequence[float], scores: Sequence[PairScore]) -> Shift:
        return cls(sum(values) / len(values), clustered_mean(values, [score.question_id for score in scores]))

    @property
    def sign(self) -> int:
        """1 or -1 where the interval leaves 0 out, else 0."""
        low, high = self.ci95 or (0.0, 0.0)
        return (low > 0) - (high < 0)

    def __str__(self) -> str:
        return f"{self.value:+.3f}" + (f" ({self.ci95[0]:+.3f} to {self.ci95[1]:+.3f})" if self.ci95 else "")


@dataclass(frozen=True)
class Steered:
    """One layer: shifts with alpha times its vector added (`up`) and taken away (`down`), with a `random` one of the same norm."""

    up: Shift
    down: Shift
    random: Shift
    directed: Shift


@dataclass(frozen=True)
class Layer:
    """norm of vector `layer`; share: of the norm of the friendly character's mean state; cosine: of the two halves' vectors."""

    layer: int
    norm: float
    share: float | None
    cosine: float | None
    steered: Steered | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def agreement(differences: Tensor, groups: Sequence[str]) -> list[float | None]:
    """Per layer the cosine between the mean differences [n, layers, H] of every other group and of the rest; None for one group.

    groups: what each row belongs to, its question: rows of one question are in the same half.
    """
    import torch

    place = {name: number for number, name in enumerate(dict.fromkeys(groups))}
    if len(place) < 2:
        return [None] * differences.shape[1]
    odd = torch.tensor([place[name] % 2 == 1 for name in groups])
    halves = differences[~odd].mean(0), differences[odd].mean(0)
    found = torch.nn.functional.cosine_similarity(*halves, dim=1).tolist()
    return [
        value if float(one.norm()) and float(other.norm()) else None
        for value, one, other in zip(found, *halves, strict=True)
    ]


def chosen(settings: SteerConfig, n_layers: int) -> list[int]:
    """The layers to steer at. UserError for one that the model lacks."""
    layers = list(range(1, n_layers + 1)) if settings.layers is None else settings.layers
    if bad := [layer for layer in layers if not 0 <= layer <= n_layers]:
        raise UserError(f"steer.layers: {bad[0]}: expected 0 (embeddings) to {n_layers}")
    return layers


def steer(
    reader: Reader, vectors: Tensor, pairs: Sequence[Pair], settings: SteerConfig, seed: int
) -> Iterator[tuple[int, Steered]]:
    """Layer by layer, what adding its vector of `vectors` [n_layers + 1, H] does to the probe. seed: of the random vectors."""
    layers = [layer for layer in chosen(settings, reader.policy.n_layers) if bool(vectors[layer].any())]
    shifted = PairProbe({"pairs": pairs}, reader).steered(_pushes(vectors, layers, settings.alpha, seed))
    for layer in layers:
        up, down, other = next(shifted), next(shifted), next(shifted)
        half = [(plus.shift - minus.shift) / 2 for plus, minus in zip(up, down, strict=True)]
        added, taken, random = (Shift.of([score.shift for score in scores], scores) for scores in (up, down, other))
        yield layer, Steered(added, taken, random, Shift.of(half, up))


def _pushes(vectors: Tensor, layers: Sequence[int], alpha: float, seed: int) -> Iterator[Mapping[int, Tensor]]:
    """For each layer: alpha times its vector, minus that, a random vector of the same norm."""
    import torch

    for layer in layers:
        push = alpha * vectors[layer]
        other = torch.randn(push.shape, generator=torch.Generator().manual_seed(seed + layer))
        yield from ({layer: push}, {layer: -push}, {layer: other * (push.norm() / other.norm())})
