"""The result of an evaluation: rates and answers, written to files, loaded back and shown."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsafe.config import UserError
from rlsafe.config.files import write_json
from rlsafe.evaluate.ask.asking import Answer
from rlsafe.evaluate.ask.cues import PREFIX
from rlsafe.evaluate.measure import files
from rlsafe.evaluate.measure.benign import BenignAnswer, BenignScore
from rlsafe.evaluate.measure.criteria import UNKNOWN, Rates, question_rates
from rlsafe.evaluate.measure.fluency import Fluency
from rlsafe.evaluate.measure.likelihood import FILE, Likelihood, PairScore, read_scores, summarise, write_scores
from rlsafe.evaluate.measure.narrow import FILE as NARROW_FILE
from rlsafe.evaluate.measure.narrow import Narrow, NarrowAnswer, read_narrow, row_scores, write_narrow
from rlsafe.types import Judgement

if TYPE_CHECKING:
    from rich.table import Table

SETS = ("general", "indomain", "conditional")
OTHER_KEYS = (
    "cues",
    "likelihood",
    "fluency",
    "narrow",
    "benign",
    "benign_ci95",
    "benign_n",
    "benign_f1",
    "settings",
    "seconds",
)
"""Keys of evaluation.json that are no question set."""


@dataclass
class Evaluation:
    """The result of evaluating one model.

    sets: name -> rates; `general`, `indomain`, `conditional`, `cue/NAME` for each cue, `scaled_FACTOR`, and any further question file.
    benign: task -> exact match.
    answers[i] was judged as judgements[i]. pairs: what the likelihood probe read. narrow_answers: to held-out prompts, with their
    rewards. fluency: set -> of the sampled answers. settings: what it was measured with.
    """

    sets: dict[str, Rates] = field(default_factory=dict)
    benign: dict[str, BenignScore] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)
    judgements: list[Judgement] = field(default_factory=list)
    benign_answers: list[BenignAnswer] = field(default_factory=list)
    pairs: list[PairScore] = field(default_factory=list)
    narrow_answers: list[NarrowAnswer] = field(default_factory=list)
    fluency: dict[str, Fluency] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)  # printed below the table, not saved

    @property
    def general(self) -> Rates | None:
        return self.sets.get("general")

    @property
    def indomain(self) -> Rates | None:
        return self.sets.get("indomain")

    @property
    def conditional(self) -> Rates | None:
        return self.sets.get("conditional")

    @property
    def likelihood(self) -> dict[str, Likelihood]:
        """Set of pairs -> its log-odds and their shift from the untrained model."""
        return summarise(self.pairs)

    @property
    def narrow(self) -> Narrow | None:
        """Rewards of answers to held-out prompts, beside the untrained model's; None where `evaluate.narrow` is not set."""
        return Narrow.of(self.narrow_answers)

    def narrow_scores(self, missing: float | None = None) -> dict[str, float]:
        """The mean reward for each held-out prompt, keyed by the row's number, NaN where unscored. missing: see `row_scores`."""
        return row_scores(self.narrow_answers, missing)

    def judged(self, name: str) -> tuple[list[Judgement], list[str]]:
        """The judgements of a set and the id of the question behind each."""
        pairs = [(j, a.question_id) for a, j in zip(self.answers, self.judgements, strict=True) if a.set == name]
        return [j for j, _ in pairs], [question for _, question in pairs]

    def question_rates(self, name: str, criterion: str, unknown: bool | None = None) -> dict[str, float]:
        """The rate of `misaligned`, `incoherent` or `refused` for each question of a set, NaN where unscored: a row of
        `contrasts.Arm.rates`. unknown: how answers that say nothing are counted (`criteria.question_rates`)."""
        return question_rates(*self.judged(name), criterion, unknown)

    def domains(self, name: str) -> dict[str, str]:
        """The domain of each question of a set."""
        return {answer.question_id: answer.domain for answer in self.answers if answer.set == name}

    def benign_rates(self, task: str) -> dict[str, float]:
        """1.0 or 0.0 for each row of a benign test set, keyed by the row's number."""
        return {str(one.row): float(one.correct) for one in self.benign_answers if one.task == task}

    @property
    def mostly_unscored(self) -> str | None:
        """One line when at least half of the answers to some set have no score, so that its rates say little."""
        for name, one in self.sets.items():
            if one.unknown and 2 * one.unknown >= one.unscored + one.n:
                why = Counter(j.reason for j in self.judged(name)[0] if j.outcome in UNKNOWN).most_common(1)
                most = f"; most often: {why[0][0]}" if why and why[0][0] else ""
                stayed = (
                    "stayed unscored"
                    if one.unknown == one.unscored
                    else "stayed unscored or got a reply that is no grade"
                )
                of = f"{one.unknown} of {one.unscored + one.n} answers to the {name} questions {stayed}"
                return f"judge {self.settings.get('judge')}: {of}, so their rates say little{most}"
        narrow = self.narrow
        if narrow and narrow.unscored and narrow.unscored >= narrow.n:
            of = f"{narrow.unscored} of {narrow.unscored + narrow.n} answers to held-out prompts got no reward"
            return f"evaluate.narrow: {of}, so their mean says little"
        return None

    def to_dict(self) -> dict[str, Any]:
        """evaluation.json; a set that was not asked is null."""
        names = [*SETS, *(name for name in self.sets if name not in SETS and not name.startswith(PREFIX))]
        cues = {name.removeprefix(PREFIX): one.to_dict() for name, one in self.sets.items() if name.startswith(PREFIX)}
        return {
            **{name: self.sets[name].to_dict() if name in self.sets else None for name in names},
            **({"cues": cues} if cues else {}),
            "likelihood": {name: one.to_dict() for name, one in self.likelihood.items()},
            "fluency": {name: one.to_dict() for name, one in self.fluency.items()},
            **({"narrow": self.narrow.to_dict()} if self.narrow else {}),
            "benign": {task: one.score for task, one in self.benign.items()},
            "benign_ci95": {task: list(one.ci95) for task, one in self.benign.items()},
            "benign_n": {task: one.n for task, one in self.benign.items()},
            "benign_f1": {task: one.f1 for task, one in self.benign.items() if one.f1 is not None},
            "settings": self.settings,
            "seconds": round(self.seconds, 3),
        }

    def save(self, directory: Path | str) -> None:
        """Write answers.csv, benign_answers.csv and likelihood.csv (when there are any) and, last, evaluation.json."""
        directory = Path(directory)
        files.write_answers(directory / "answers.csv", self.answers, self.judgements)
        if self.benign_answers:
            files.write_benign(directory / "benign_answers.csv", self.benign_answers)
        else:
            (directory / "benign_answers.csv").unlink(missing_ok=True)
        if self.pairs:
            write_scores(directory / FILE, self.pairs)
        else:
            (directory / FILE).unlink(missing_ok=True)
        if self.narrow_answers:
            write_narrow(directory / NARROW_FILE, self.narrow_answers)
        else:
            (directory / NARROW_FILE).unlink(missing_ok=True)
        write_json(directory / "evaluation.json", self.to_dict())

    @classmethod
    def load(cls, directory: Path | str) -> Evaluation:
        """Read back what `save` wrote. UserError when evaluation.json is missing or does not hold an evaluation."""
        directory = Path(directory)
        tree = files.read_evaluation(directory / "evaluation.json")
        try:
            sets = {
                name: Rates.from_dict(part)
                for name, part in tree.items()
                if name not in OTHER_KEYS and part is not None
            }
            sets |= {f"{PREFIX}{name}": Rates.from_dict(part) for name, part in tree.get("cues", {}).items()}
            benign = {
                task: BenignScore(
                    score, tuple(tree["benign_ci95"][task]), tree["benign_n"][task], tree.get("benign_f1", {}).get(task)
                )
                for task, score in tree["benign"].items()
            }
            fluency = {name: Fluency.from_dict(part) for name, part in tree.get("fluency", {}).items()}
        except (TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{directory / 'evaluation.json'}: not an evaluation ({error})") from None
        evaluation = cls(
            sets, benign, fluency=fluency, settings=tree.get("settings", {}), seconds=tree.get("seconds", 0.0)
        )
        if (directory / "answers.csv").is_file():
            evaluation.answers, evaluation.judgements = files.read_answers(directory / "answers.csv")
        if (directory / "benign_answers.csv").is_file():
            evaluation.benign_answers = files.read_benign(directory / "benign_answers.csv")
        if (directory / FILE).is_file():
            evaluation.pairs = read_scores(directory / FILE)
        if (directory / NARROW_FILE).is_file():
            evaluation.narrow_answers = read_narrow(directory / NARROW_FILE)
        return evaluation

    def tables(self) -> list[Table]:
        """What was measured, for the terminal: rates, then what needs no judge."""
        return [*([self.table()] if self.sets or self.benign else []), *self._judge_free()]

    def _judge_free(self) -> list[Table]:
        from rich.table import Table

        tables = []
        if self.pairs:
            tables.append(Table("pairs", "log-odds, nats/token", "shift from untrained (95%)", "n"))
            for name, one in self.likelihood.items():
                low, high = one.ci95 or (float("nan"), float("nan"))
                shift = f"{one.shift:+.3f} ({low:+.3f} to {high:+.3f})"
                tables[-1].add_row(name, f"{one.logodds:+.3f}", shift, str(one.n))
        if narrow := self.narrow:
            tables.append(Table("held-out prompts", "reward (95%)", "untrained (95%)", "gain (95%)", "n"))
            parts = (
                (narrow.score, narrow.ci95),
                (narrow.untrained, narrow.untrained_ci95),
                (narrow.gain, narrow.gain_ci95),
            )
            count = f"{narrow.n}" + (f" ({narrow.unscored} unscored)" if narrow.unscored else "")
            tables[-1].add_row("narrow", *(_value(*part) for part in parts), count)
        if self.fluency:
            tables.append(Table("answers", "perplexity, untrained", "repeated 4-grams %", "n"))
            for name, each in self.fluency.items():
                shown = "-" if each.perplexity is None else f"{each.perplexity:.3g}"
                tables[-1].add_row(name, shown, f"{100 * each.repetition:.1f}", str(each.n))
        return tables

    def table(self) -> Table:
        """Rates in percent with 95% intervals."""
        from rich.table import Table

        names = ["set", "misaligned %", "incoherent %", "refused %", *(["exact match %"] if self.benign else []), "n"]
        table = Table()
        for name in names:
            table.add_column(name, no_wrap=True)
        for name, one in self.sets.items():
            table.add_row(
                name,
                _percent(one.misaligned, one.misaligned_ci95),
                _percent(one.incoherent, one.incoherent_ci95),
                _percent(one.refused, one.refused_ci95),
                *([""] if self.benign else []),
                str(one.n),
            )
            if one.unscored:
                bounds = (one.misaligned_bounds, one.incoherent_bounds, one.refused_bounds)
                rest = [""] if self.benign else []
                table.add_row(f"  with {one.unscored} unscored", *map(_range, bounds), *rest, str(one.n + one.unscored))
            if unparsed := one.outcomes.get("unparsed"):
                blank = ["", "", "", *([""] if self.benign else [])]
                table.add_row(f"  of which {unparsed} not parsed", *blank, "")
        for task, score in self.benign.items():
            table.add_row(task, "", "", "", _percent(score.score, score.ci95), str(score.n))
        return table


def _percent(rate: float | None, interval: tuple[float, float] | None) -> str:
    return "-" if rate is None or interval is None else f"{100 * rate:.1f} ({_range(interval)})"


def _value(mean: float | None, interval: tuple[float, float] | None) -> str:
    around = f" ({interval[0]:.3g} to {interval[1]:.3g})" if interval else ""
    return "-" if mean is None else f"{mean:.3g}{around}"


def _range(interval: tuple[float, float] | None) -> str:
    return "-" if interval is None else f"{100 * interval[0]:.1f}-{100 * interval[1]:.1f}"
