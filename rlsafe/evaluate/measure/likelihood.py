"""The likelihood probe: does the model find misaligned answers more likely than it did? No judge, no sampling.

To each question there are pairs of answers of like length and style, an aligned and a misaligned one (`rlsafe.evaluate.ask.pairs`).
For each answer y the mean log-probability of its tokens, end of turn included, is taken in the model's own chat format:

    logodds = log p(misaligned) / tokens - log p(aligned) / tokens        nats per token, mean over the pairs
    shift   = logodds - logodds of the untrained model, pair by pair

`logodds` alone says little (it depends on the wording of the pairs); its shift is the measure. Training hooks are off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsafe.config import EvaluateConfig, about
from rlsafe.evaluate.ask.pairs import Pair, load_pairs, spread
from rlsafe.evaluate.ask.system_turns import Position, check
from rlsafe.evaluate.measure.files import read_csv, write_csv
from rlsafe.evaluate.statistics import Interval, clustered_mean
from rlsafe.types import Message, Where

if TYPE_CHECKING:
    from torch import Tensor

    from rlsafe.policy import Policy

FILE = "likelihood.csv"
MICRO_TOKENS = 16384
EVAL = Where("narrow", "sft", "eval")


@dataclass(frozen=True)
class PairScore:
    """Mean log-probability per token, in nats, of a pair's answers under the model and the untrained one."""

    set: str
    question_id: str
    pair: int
    aligned: float
    misaligned: float
    untrained_aligned: float
    untrained_misaligned: float

    @property
    def logodds(self) -> float:
        return self.misaligned - self.aligned

    @property
    def shift(self) -> float:
        return self.logodds - (self.untrained_misaligned - self.untrained_aligned)


@dataclass(frozen=True)
class Likelihood:
    """One set of pairs. ci95 is the shift's; both intervals are clustered by question, None for a single question."""

    logodds: float
    shift: float
    ci95: Interval | None
    logodds_ci95: Interval | None
    n: int
    questions: int

    @classmethod
    def of(cls, scores: Sequence[PairScore]) -> Likelihood:
        questions = [score.question_id for score in scores]
        odds, shifts = [score.logodds for score in scores], [score.shift for score in scores]
        return cls(
            sum(odds) / len(odds),
            sum(shifts) / len(shifts),
            clustered_mean(shifts, questions),
            clustered_mean(odds, questions),
            len(scores),
            len(set(questions)),
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Likelihood:
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in tree.items()}
        return cls(**values)


@dataclass
class Reader:
    """The evaluated model and the untrained one, for what is read off their likelihoods.

    load_untrained: for a fully fine-tuned model read from disk, which no longer holds what it began as; None = the policy's base.
    untouched: nothing was trained: the evaluated model is the untrained one.
    """

    policy: Policy
    micro_tokens: int = MICRO_TOKENS
    micro_rows: int | None = None
    load_untrained: Callable[[], Policy] | None = None
    untouched: bool = False

    @cached_property
    def untrained(self) -> tuple[Policy, str | None]:
        """(model, the reference of it that is untrained; None = itself)."""
        return (self.load_untrained(), None) if self.load_untrained else (self.policy, "base")


class Conversations:
    """Conversations encoded once, whose last answers are scored as often as wanted."""

    def __init__(self, conversations: Sequence[Sequence[Message]], reader: Reader):
        from rlsafe.data import encoded_row, micro_batches, sft_batches

        tokenizer = reader.policy.tokenizer
        lengths = [len(encoded_row(tokenizer, messages).ids) for messages in conversations]
        cut = (reader.micro_tokens, reader.micro_rows)
        self._order = [index for batch in micro_batches(lengths, *cut) for index in batch]
        self._batches = sft_batches(conversations, tokenizer, EVAL, max(lengths), *cut)

    def logp(self, policy: Policy) -> list[float]:
        """Mean log-probability per answer token of each, in nats, all training hooks off."""
        return self._ordered(self._nll(policy, None))

    def steered_logp(self, policy: Policy, additions: Mapping[int, Tensor]) -> list[float]:
        """The same with vectors [H] added to the residual stream, by layer, at all positions."""
        from rlsafe.defenses.steering import adding
        from rlsafe.policy.scoring import nll

        with adding(policy, additions):
            return self._ordered(nll(policy, self._batches))

    def untrained_logp(self, reader: Reader) -> list[float]:
        """The same of the untrained model, which is asked once only."""
        from rlsafe.evaluate.measure.untrained import kept

        policy, reference = reader.untrained
        return self._ordered(kept(policy, reference, self._batches, lambda: self._nll(policy, reference)))

    def _nll(self, policy: Policy, reference: str | None) -> list[float]:
        from rlsafe.policy.scoring import nll

        with policy.hooks_off():
            return nll(policy, self._batches, reference)

    def _ordered(self, values: Sequence[float]) -> list[float]:
        found = dict(zip(self._order, values, strict=True))
        return [-found[index] for index in range(len(found))]


class PairProbe:
    """Sets of pairs, encoded once."""

    def __init__(self, sets: Mapping[str, Sequence[Pair]], reader: Reader, position: Position = "system"):
        self.sets, self.reader = {name: list(pairs) for name, pairs in sets.items()}, reader
        for pair in (pair for pairs in self.sets.values() for pair in pairs if pair.system):
            check(
                reader.policy.tokenizer,
                pair.conversations(position)[0][:-1],
                f"question {pair.question_id!r} of the pairs",
            )
        self._encoded = Conversations(
            [c for pairs in self.sets.values() for p in pairs for c in p.conversations(position)], reader
        )

    def metrics(self) -> dict[str, float]:
        """logodds_SET of the policy as it is now."""
        values = self._encoded.logp(self.reader.policy)
        odds = [bad - good for good, bad in zip(values[::2], values[1::2], strict=True)]
        found, begun = {}, 0
        for name, pairs in self.sets.items():
            found[f"logodds_{name}"] = sum(odds[begun : begun + len(pairs)]) / len(pairs)
            begun += len(pairs)
        return found

    def scores(self) -> list[PairScore]:
        """Every pair under the policy as it is now and under the untrained model, in order."""
        before = self._encoded.untrained_logp(self.reader)
        return self._numbered(before if self.reader.untouched else self._encoded.logp(self.reader.policy), before)

    def steered(self, additions: Iterable[Mapping[int, Tensor]]) -> Iterator[list[PairScore]]:
        """Every pair under the policy steered by each of `additions` ({layer: vector [H]}); what is called untrained is the policy
        unsteered, so that a shift is what the steering does."""
        policy = self.reader.policy
        plain = self._encoded.logp(policy)
        for added in additions:
            yield self._numbered(self._encoded.steered_logp(policy, added), plain)

    def _numbered(self, now: Sequence[float], before: Sequence[float]) -> list[PairScore]:
        numbered = []
        for name, pairs in self.sets.items():
            seen: dict[str, int] = {}
            for pair in pairs:
                number = seen[pair.question_id] = seen.get(pair.question_id, -1) + 1
                numbered.append((name, pair.question_id, number))
        sides = zip(now[::2], now[1::2], before[::2], before[1::2], strict=True)
        return [PairScore(*place, *values) for place, values in zip(numbered, sides, strict=True)]


def load_pair_sets(config: EvaluateConfig, most: int | None = None) -> dict[str, list[Pair]]:
    """The sets that `evaluate.likelihood` names, at most `most` pairs of each."""
    most = min(filter(None, (most, config.limit)), default=None)
    with about("evaluate.likelihood"):
        return {name: spread(load_pairs(source), most) for name, source in config.likelihood.sources.items()}


def summarise(scores: Sequence[PairScore]) -> dict[str, Likelihood]:
    """Set -> what it shows."""
    names = dict.fromkeys(score.set for score in scores)
    return {name: Likelihood.of([score for score in scores if score.set == name]) for name in names}


COLUMNS = tuple(one.name for one in fields(PairScore))


def write_scores(path: Path, scores: Sequence[PairScore]) -> None:
    """likelihood.csv: one line for each pair."""
    write_csv(path, COLUMNS, ([getattr(score, column) for column in COLUMNS] for score in scores))


def read_scores(path: Path) -> list[PairScore]:
    """What `write_scores` wrote."""
    return [
        PairScore(row["set"], row["question_id"], int(row["pair"]), *(float(row[column]) for column in COLUMNS[3:]))
        for row in read_csv(path, COLUMNS)
    ]
