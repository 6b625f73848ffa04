"""`--dry-run`: everything that can be said about a run without a model, a GPU or a network."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from rlsafe.config import DataConfig, EvaluateConfig, ModelConfig, RunConfig, StreamConfig, UserError, about, dump_yaml
from rlsafe.data import load_rows, recipe_of, split_prompt
from rlsafe.data.turns import Key, key_of, opened
from rlsafe.engine.plan.estimate import Memory, describe_memory, memory, unfit, unfit_here
from rlsafe.engine.plan.schedule import describe
from rlsafe.engine.plan.timing import LENGTH, Load, sampling, seconds, shown, speed_of
from rlsafe.engine.run.build import Prepared, model_path, prepare, training_threads
from rlsafe.engine.run.rows import local_tokenizer, usable
from rlsafe.evaluate import Estimate
from rlsafe.evaluate.commands.costs import of_run
from rlsafe.policy.load import load_tokenizer
from rlsafe.policy.shapes import ModelShape, model_shape
from rlsafe.types import Row, provider_for

FRAME_OF_A_TURN = 6  # tokens that a chat template puts around a turn, about
QUESTION, PAIR = 60, 90  # tokens of a question that an evaluation asks; of one with a given answer


@dataclass
class Work:
    """What a run trains on, samples and has judged. answers: of the evaluation and the probes, benign ones too."""

    steps: int = 0
    sft_tokens: float = 0.0
    completions: int = 0
    completion_tokens: int = 0
    answers: int = 0
    judging: Estimate = field(default_factory=Estimate)
    graders: set[str] = field(default_factory=set)
    further: int = 0  # completions at most for groups without spread (grpo.resample)
    seconds: tuple[float, float] = (0.0, 0.0)  # on this CPU: of training, of sampling and scoring; zeros where unknown

    def __add__(self, other: Work) -> Work:
        return Work(
            self.steps + other.steps, self.sft_tokens + other.sft_tokens, self.completions + other.completions,
            self.completion_tokens + other.completion_tokens, self.answers + other.answers,
            self.judging + other.judging, self.graders | other.graders, self.further + other.further,
            (self.seconds[0] + other.seconds[0], self.seconds[1] + other.seconds[1]),
        )  # fmt: skip

    def lines(self, jobs: int = 1) -> list[str]:
        """What there is to do, for people: steps, training, rewards, answers, judging, time where `jobs` runs go on at a time."""
        trained = [f"about {short(self.sft_tokens)} tokens by supervision"] if self.sft_tokens else []
        if self.completions:
            most = f"at most {short(self.completion_tokens)} tokens"
            trained.append(f"{self.completions:,} completions ({most}) by reward")
        lines = [f"steps: {self.steps:,}", "training: " + (", ".join(trained) or "nothing")]
        if self.further:
            lines.append(f"grpo.resample: at most {self.further:,} completions more, for groups without spread")
        if self.completions:
            lines.append(f"rewards: {', '.join(sorted(self.graders))} (a model that grades is asked once a completion)")
        lines += [f"evaluation and probes: {self.answers:,} answers", *self.judging.lines()]
        if sum(self.seconds):
            training, sampling = (part / jobs for part in self.seconds)
            lines.append(
                f"time on this CPU: about {shown(training + sampling)}, training {shown(training)}, sampling and scoring "
                f"{shown(sampling)} ({f'{jobs} runs at a time, ' if jobs > 1 else ''}as busy as it is now; graders not counted)"
            )
        return lines


def _measure(prepared: Prepared) -> None:
    """Leave out the rows that the run would leave out, where tokenizer and config of the model are on this machine."""
    found = local_tokenizer(prepared.config.model.model_dump_json(), model_path(prepared.config))
    if found is None:
        prepared.notes.append(
            f"{prepared.config.model.name}: its tokenizer is not on this machine: no row was measured"
        )
        return
    fitted = usable(prepared, *found)
    prepared.rows, prepared.notes = fitted.streams, prepared.notes + fitted.notes


@dataclass
class Dry:
    """A run that is not made: `prepared` as for a real one, with empty streams where the data are not on this machine."""

    prepared: Prepared
    work: Work
    memory: list[str]
    need: Memory | None
    notes: list[str]


def dry(config: RunConfig, jobs: int = 1) -> Dry:
    """Check the config and count. UserError for whatever is wrong with it; what is merely not on this machine is a note. jobs: runs
    that share the machine."""
    notes: list[str] = []
    with offline():
        evaluate = _reachable(config.evaluate, notes)
        prepared = prepare(config.model_copy(update={"evaluate": evaluate}), load=_local_streams)
        prepared.config.evaluate = config.evaluate
        _measure(prepared)
        work = _work(prepared, evaluate)
        work.seconds = _seconds(prepared, evaluate, work, jobs)
        lines, need = _memory(prepared)
    return Dry(prepared, work, lines, need, notes + prepared.notes)


def dry_run(config: RunConfig, out: Path) -> list[str]:
    """The lines that `rlsafe train CONFIG --dry-run` prints."""
    found = dry(config)
    prepared = found.prepared
    rows = [f"data.{name}: {len(rows):,} rows" for name, rows in prepared.rows.items() if rows]
    return [
        dump_yaml(prepared.config), *rows, *describe(prepared.plan), *found.work.lines(), *found.memory,
        *(f"note: {note}" for note in found.notes), f"out: {out}",
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------ what is not here


@contextmanager
def offline() -> Iterator[None]:
    """Hub libraries look into their caches only. `datasets` takes the sign over when it is imported, inside or earlier."""
    import huggingface_hub.constants

    hub, name = huggingface_hub.constants, "HF_HUB_OFFLINE"
    before = getattr(hub, name)
    try:
        for module in filter(None, (hub, sys.modules.get("datasets.config"))):
            setattr(module, name, True)
        yield
    finally:
        for module in filter(None, (hub, sys.modules.get("datasets.config"))):
            setattr(module, name, before)


def _remote(stream: StreamConfig) -> str | None:
    """The hub id or URL behind a stream; None when it is a file or comes from a provider."""
    source = recipe_of(stream).source
    preset = source.startswith("preset:") and recipe_of(StreamConfig(source=source)).source
    source = preset or source
    if source.startswith(("http://", "https://")):
        return source
    local = Path(source).expanduser()
    if provider_for(source) or local.exists() or local.suffix or source.count("/") != 1:
        return None
    return source


def _local_streams(data: DataConfig, seed: int, note: Callable[[str], None]) -> dict[str, list[Row]]:
    streams: dict[str, list[Row]] = {}
    for name in ("narrow", "safe", "benign"):
        stream: StreamConfig | None = getattr(data, name)
        if stream is None:
            continue
        remote = _remote(stream)
        if remote and remote.startswith("http"):
            streams[name] = []
        else:
            try:
                with about(f"data.{name}"):
                    streams[name] = load_rows(stream, seed, note)
            except UserError:
                if remote is None:
                    raise
                streams[name] = []
        if not streams[name]:
            note(f"data.{name}: {remote} is not on this machine: not read, its tokens are guessed")
    return streams


def _reachable(config: EvaluateConfig, notes: list[str]) -> EvaluateConfig:
    """Without the benign test sets that would have to be downloaded."""
    here = []
    for source in config.benign:
        remote = _remote(StreamConfig(source=source))
        if remote is None:
            here.append(source)
        else:
            notes.append(f"evaluate.benign: {source} ({remote}) was not read")
    return config.model_copy(update={"benign": here})


# ------------------------------------------------------------------------------------------------ counting


def _work(prepared: Prepared, evaluate: EvaluateConfig) -> Work:
    config, plan = prepared.config, prepared.plan
    rows: Counter[tuple[str, str]] = Counter()
    for step in plan:
        for part in step.parts:
            rows[part.stream, part.path] += part.rows
    completions = sum(n for (_, path), n in rows.items() if path == "grpo") * config.grpo.generations
    work = Work(
        steps=len(plan),
        sft_tokens=sum(n * _mean_tokens(prepared, stream) for (stream, path), n in rows.items() if path == "sft"),
        completions=completions,
        completion_tokens=completions * config.grpo.max_tokens,
        graders=set(prepared.rewards.rewards) if prepared.rewards else set(),
        further=sum(part.path == "grpo" for step in plan for part in step.parts)
        * config.grpo.resample
        * config.grpo.generations,
    )
    if (material := prepared.material) is not None:
        every = config.track.every
        probes = sum(step.index % every == 0 or step is plan[-1] for step in plan) if every else 0
        work.judging = of_run(config, evaluate, material, probes)
        work.answers = work.judging.answers + sum(map(len, material.tasks.values()))
        if held_out := material.narrow:  # of this model and of the untrained one
            work.answers += 2 * held_out.settings.samples * len(held_out.rows)
    return work


def _mean_tokens(prepared: Prepared, stream: str) -> float:
    """Of one row: counted on some rows where the tokenizer is on this machine; else four characters a token and six tokens around
    a turn, as in English; 400 where there is nothing to look at."""
    rows = prepared.rows.get(stream) or prepared.rows.get("narrow") or []
    if not rows:
        return 400.0
    model, path = prepared.config.model.model_dump_json(), model_path(prepared.config)
    if _read_tokenizer(model, path) is not None:
        some = rows[:: max(1, len(rows) // 64)]
        return sum(_tokens(model, path, key_of(row["messages"])) for row in some) / len(some)
    turns = [message["content"] for row in rows for message in row["messages"]]
    return (sum(map(len, turns)) / 4 + FRAME_OF_A_TURN * len(turns)) / len(rows)


@lru_cache(maxsize=1 << 16)
def _tokens(model: str, path: str, conversation: Key) -> int:
    """Of a conversation under the tokenizer of `_read_tokenizer`. The cells of a comparison share their rows."""
    return len(_read_tokenizer(model, path).apply_chat_template(opened(conversation)[0], return_dict=False))


@lru_cache
def _read_tokenizer(model: str, path: str) -> Any:
    """That of a model directory on this machine, else None."""
    if not Path(path).is_dir():
        return None
    try:
        return load_tokenizer(ModelConfig.model_validate_json(model), path)
    except UserError:
        return None  # loading the model says why


def _seconds(prepared: Prepared, evaluate: EvaluateConfig, work: Work, jobs: int) -> tuple[float, float]:
    """See `Work.seconds`. Only where a CPU will train, with a model whose dimensions are known. The untrained model's half of the
    pairs is not counted: every run but the first finds it saved."""
    import torch

    config = prepared.config
    shape = _shape(config.model.model_dump_json(), model_path(config))
    if shape is None or shape.parameters > 1e9 or torch.cuda.is_available():
        return (0.0, 0.0)
    frozen = any(need.reference for defense in prepared.defenses for need in defense.needs)
    load, grpo = Load(), config.grpo
    mean = {name: _mean_tokens(prepared, name) for name in {part.stream for s in prepared.plan for part in s.parts}}
    for step in prepared.plan:
        for part in step.parts:
            tokens = mean[part.stream]
            if part.path == "grpo":
                completions, length = part.rows * grpo.generations, LENGTH * grpo.max_tokens
                prompt = tokens / 2  # about: answers are as long as what is asked
                load += sampling(completions, prompt / grpo.generations, length, config.sampler.max_num_seqs)
                trained = completions * (prompt + length) * grpo.iterations
            else:
                trained = part.rows * tokens
            load += Load(trained=trained, forwarded=trained if frozen else 0.0)
    if (material := prepared.material) is not None:
        length = LENGTH * evaluate.max_tokens
        load += sampling(work.answers, QUESTION, length, config.sampler.max_num_seqs)
        if evaluate.fluency:
            load += Load(forwarded=work.answers * (QUESTION + length))
        pairs = sum(map(len, material.pairs.values()))
        every = config.track.every
        probes = 1 + sum(step.index % every == 0 for step in prepared.plan) if every else 1
        load += Load(forwarded=2.0 * pairs * PAIR * probes)
    threads = min(training_threads(shape.parameters), max(1, (os.cpu_count() or 1) // jobs))
    return seconds(config, shape, load, speed_of(config.model.dtype, threads))


def _memory(prepared: Prepared) -> tuple[list[str], Memory | None]:
    import psutil
    import torch

    config = prepared.config
    shape = _shape(config.model.model_dump_json(), model_path(config))
    if shape is None:
        return [
            f"memory: {config.model.name} is neither on this machine nor a model whose dimensions we know: no estimate"
        ], None
    cuda = torch.cuda.is_available() or shape.parameters > 1e9  # nobody trains a billion on a CPU: say what a GPU needs
    frozen = any(need.reference for defense in prepared.defenses for need in defense.needs)
    longest = {name: _longest(rows) for name, rows in prepared.rows.items() if rows}
    need = memory(config, shape, cuda=cuda, references=frozen, longest=longest)
    if torch.cuda.is_available():
        warnings = unfit(config, need, *torch.cuda.mem_get_info())
    else:
        warnings = unfit_here(need, cuda, psutil.virtual_memory().available)
    return [*describe_memory(config, shape, need, cuda), *warnings], need


@lru_cache
def _shape(model: str, path: str) -> ModelShape | None:
    """Cells of a comparison share their model."""
    return model_shape(ModelConfig.model_validate_json(model), path)


def _longest(rows: list[Row]) -> tuple[int, int]:
    """Tokens of the longest row and of the longest prompt: at most one for every three characters, nearly always."""
    row = prompt = 0
    for one in rows:
        asked, answer = split_prompt(one)
        before = sum(len(turn["content"]) // 3 + FRAME_OF_A_TURN for turn in asked)
        prompt = max(prompt, before)
        row = max(row, before + len(answer or "") // 3 + FRAME_OF_A_TURN)
    return row, prompt


def short(count: float) -> str:
    """12300 -> 12.3k."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.1f}{letter}"
    return f"{count:.0f}"
