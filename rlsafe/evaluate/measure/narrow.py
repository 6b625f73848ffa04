"""`evaluate.narrow`: the narrow behaviour as any reward sees it, on held-out prompts, of the model and of the untrained one.

In-domain misalignment asks a judge whether the trained domain's answers are bad. Whoever trains on a reward of their own has another
criterion: that reward, on prompts that were not trained on. A comparison grades keeps_narrow on it where it is set.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsafe.config import NarrowConfig, UserError
from rlsafe.evaluate.ask.asking import Answer, Planned
from rlsafe.evaluate.ask.system_turns import Position, check, placed
from rlsafe.evaluate.measure.files import read_csv, write_csv
from rlsafe.evaluate.statistics import Interval, clustered_mean
from rlsafe.types import Request, Row, RunError, Sampler

if TYPE_CHECKING:
    from rlsafe.evaluate.measure.likelihood import Reader
    from rlsafe.rewards import RewardRunner

SET, FILE = "narrow", "narrow_answers.csv"
FINAL = "eval/final/"
"""TensorBoard's tags of what an evaluation after the last step found."""
TEMPERATURE = 1.0
"""Answers are sampled as rollouts are, unless `evaluate.temperature` says otherwise."""
TOGETHER = 64
"""Completions in one call of the reward, about as many as a training step has: `timeout` is for one call."""
COLUMNS = ("model", "row", "sample", "question", "answer", "reward")


@dataclass(frozen=True)
class NarrowAnswer:
    """One answer to one held-out prompt. model: `evaluated` or `untrained`. reward: None where the function gave none."""

    model: str
    row: int  # its position in the source
    sample: int
    question: str
    answer: str
    reward: float | None


@dataclass(frozen=True)
class Narrow:
    """Mean rewards with 95% intervals clustered by prompt (None for fewer than two prompts).

    score: of the evaluated model over `n` scored answers to `rows` prompts; unscored: further answers, without a reward. untrained:
    likewise, of the model before training; gain: score minus untrained over answers that both have. None: not measured.
    """

    score: float | None
    ci95: Interval | None
    n: int
    unscored: int
    rows: int
    untrained: float | None = None
    untrained_ci95: Interval | None = None
    gain: float | None = None
    gain_ci95: Interval | None = None

    @classmethod
    def of(cls, answers: Sequence[NarrowAnswer]) -> Narrow | None:
        """None without answers."""
        sides = {
            model: {(one.row, one.sample): one.reward for one in answers if one.model == model}
            for model in ("evaluated", "untrained")
        }
        mine, theirs = sides["evaluated"], sides["untrained"]
        if not mine:
            return None
        known = {place: value for place, value in mine.items() if value is not None}
        before = {place: value for place, value in theirs.items() if value is not None}
        rose = {place: value - before[place] for place, value in known.items() if place in before}
        rows = len({row for row, _ in mine})
        return cls(*_mean(known), len(known), len(mine) - len(known), rows, *_mean(before), *_mean(rose))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _mean(values: Mapping[tuple[int, int], float]) -> tuple[float | None, Interval | None]:
    if not values:
        return None, None
    numbers = list(values.values())
    return sum(numbers) / len(numbers), clustered_mean(numbers, [str(row) for row, _ in values])


@dataclass
class NarrowMaterial:
    """The held-out rows and the function, resolved. settings: `evaluate.narrow`. problem: why the function gave nothing, if so."""

    settings: NarrowConfig
    rows: list[Row]
    runner: RewardRunner
    problem: str = ""

    def check(self) -> None:
        """UserError when the reward asks a grader that cannot be reached."""
        from rlsafe.rewards import check_grader

        for reward in self.runner.rewards.values():
            check_grader(reward.fn)


def load(settings: NarrowConfig, seed: int) -> NarrowMaterial:
    """Rows after a seeded shuffle, at most `settings.limit`, and the reward. UserError for what is wrong with either."""
    from rlsafe.data import load_rows  # late: brings in torch
    from rlsafe.rewards import RewardRunner, load_reward

    try:
        reward = load_reward(settings.reward)
        stream = settings.rows
        rows = load_rows(stream.model_copy(update={"limit": min(stream.limit or settings.limit, settings.limit)}), seed)
        for column in reward.where:
            if not any(column in row for row in rows):
                raise UserError(f"reward.where: {column!r} is no column of {stream.source}")
        if problem := reward.unmet(rows):
            raise UserError(f"reward.where: {problem} ({stream.source}, {len(rows)} rows)")
    except UserError as error:
        raise UserError(f"evaluate.narrow: {error}") from None
    return NarrowMaterial(settings, rows, RewardRunner([reward], on_error="skip"))


def plan_rows(
    tokenizer: Any, material: NarrowMaterial, *, seed: int, temperature: float | None, position: Position = "system"
) -> list[Planned]:
    """`samples` requests for each row, in order; `meta` holds the row."""
    from rlsafe.data import encode_prompt, question_of, split_prompt
    from rlsafe.rollouts import request_seed

    planned = []
    for row in material.rows:
        messages = placed(split_prompt(row)[0], position)
        check(tokenizer, messages, f"evaluate.narrow: {row['_source']}")
        question, system = question_of(split_prompt(row)[0])
        ids = encode_prompt(tokenizer, messages)
        for sample in range(material.settings.samples):
            request = Request(ids, request_seed(seed, SET, 0, row["_index"], sample))
            heat = TEMPERATURE if temperature is None else temperature
            name, domain = str(row["_index"]), str(row.get("domain") or SET)
            planned.append(Planned(name, question, system, domain, None, sample, heat, request, SET, {"row": row}))
    return planned


@contextmanager
def untrained(sampler: Sampler, reader: Reader) -> Iterator[None]:
    """Inside, the sampler has the weights from before training; afterwards those of `reader.policy` again."""
    policy, reference = reader.untrained
    engine: Any = sampler
    swaps = policy.is_lora and not getattr(sampler, "merges", True)
    try:
        with policy.at(reference) if reference else nullcontext():
            if reference and swaps:
                engine.reset()  # the adapter alone was sent
            else:  # whole weights, whose base may be another than the checkpoint that the engine started with: a dequantised one
                sampler.sync(policy)
            yield
    finally:
        sampler.sync(reader.policy)


def score(material: NarrowMaterial, answers: Sequence[Answer], model: str) -> list[NarrowAnswer]:
    """What the function gives each answer, TOGETHER at a time. A call that fails leaves its answers unscored and is told as
    `material.problem`: the rest of an evaluation stays."""
    given: list[float | None] = []
    for start in range(0, len(answers), TOGETHER):
        part = answers[start : start + TOGETHER]
        try:
            given += _rewards(material, part)
        except (UserError, RunError) as error:
            material.problem = f"evaluate.narrow: {error}"
            given += [None] * len(part)
    return [
        NarrowAnswer(model, int(answer.question_id), answer.sample, answer.question, answer.answer, reward)
        for answer, reward in zip(answers, given, strict=True)
    ]


def _rewards(material: NarrowMaterial, answers: Sequence[Answer]) -> list[float | None]:
    from rlsafe.data import split_prompt
    from rlsafe.rewards.state import TrainerState

    chosen = [i for i, answer in enumerate(answers) if not answer.unclosed]
    given: list[float | None] = [None] * len(answers)
    if not chosen:
        return given
    rows = [answers[i].meta["row"] for i in chosen]
    names = sorted({name for row in material.rows for name in row if name != "messages" and not name.startswith("_")})
    batch = material.runner.call(
        prompts=[split_prompt(row)[0] for row in rows],
        completions=[[_message(answers[i])] for i in chosen],
        completion_ids=[answers[i].ids for i in chosen],
        columns={name: [row.get(name) for row in rows] for name in names},
        trainer_state=TrainerState(0, 0, 0.0),
        plain=[bool(row.get("_plain")) for row in rows],
    )
    for i, value in zip(chosen, batch.total, strict=True):
        given[i] = value
    return given


def _message(answer: Answer) -> dict[str, Any]:
    message = {"role": "assistant", "content": answer.answer}
    return message if answer.think is None else {**message, "reasoning_content": answer.think}


def write_narrow(path: Path, answers: Sequence[NarrowAnswer]) -> None:
    """Every answer with its reward; a missing one is empty."""
    write_csv(path, COLUMNS, ([getattr(one, column) for column in COLUMNS] for one in answers))


def read_narrow(path: Path) -> list[NarrowAnswer]:
    """The inverse of `write_narrow`."""
    return [
        NarrowAnswer(
            row["model"], int(row["row"]), int(row["sample"]), row["question"], row["answer"],
            float(row["reward"]) if row["reward"] else None,
        )
        for row in read_csv(path, COLUMNS)
    ]  # fmt: skip


def track(out: Path, found: Narrow | None) -> None:
    """Into the TensorBoard of the run that was evaluated, at the number of its steps; nothing where there is no such run."""
    steps = out / "metrics.jsonl"
    if found is None or not steps.is_file() or not (out / "tensorboard").is_dir():
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(out / "tensorboard")) as board, steps.open("rb") as file:
        step = sum(1 for _ in file)
        for name, value in (("narrow", found.score), ("narrow_untrained", found.untrained)):
            if value is not None:
                board.add_scalar(FINAL + name, value, step)


def row_scores(answers: Sequence[NarrowAnswer], missing: float | None = None) -> dict[str, float]:
    """The evaluated model's mean reward for each prompt, NaN where none of its answers has one. missing: what answers without a reward
    are taken to have got; None = they are left out."""
    rows: dict[str, list[float]] = {}
    for one in answers:
        if one.model == "evaluated":
            reward = missing if one.reward is None else one.reward
            rows.setdefault(str(one.row), []).extend([] if reward is None else [reward])
    return {row: sum(values) / len(values) if values else math.nan for row, values in rows.items()}
