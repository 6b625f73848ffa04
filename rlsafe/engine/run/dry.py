"""`--dry-run`: everything that can be said about a run without a model, a GPU or a network."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from rlsafe.config import DataConfig, EvaluateConfig, ModelConfig, RunConfig, StreamConfig, UserError, about, dump_yaml
from rlsafe.data import load_rows, split_prompt
from rlsafe.engine.plan.estimate import Memory, describe_memory, memory, unfit, unfit_here
from rlsafe.engine.plan.schedule import describe
from rlsafe.engine.plan.timing import Load, seconds, speed_of
from rlsafe.engine.run.build import Prepared, model_path, prepare, training_threads
from rlsafe.engine.run.layout import will_sample
from rlsafe.engine.run.lengths import FRAME_OF_A_TURN, Lengths, remote, some
from rlsafe.engine.run.rows import local_tokenizer, usable
from rlsafe.engine.run.workload import Work, workload
from rlsafe.policy.shapes import ModelShape, model_shape
from rlsafe.types import Row


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
        work, load = workload(prepared, evaluate)
        work.seconds = _seconds(prepared.config, load, jobs)
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


def _local_streams(data: DataConfig, seed: int, note: Callable[[str], None]) -> dict[str, list[Row]]:
    streams: dict[str, list[Row]] = {}
    for name in ("narrow", "safe", "benign"):
        stream: StreamConfig | None = getattr(data, name)
        if stream is None:
            continue
        away = remote(stream)
        if away and away.startswith("http"):
            streams[name] = []
        else:
            try:
                with about(f"data.{name}"):
                    streams[name] = load_rows(stream, seed, note)
            except UserError:
                if away is None:
                    raise
                streams[name] = []
        if not streams[name]:
            note(f"data.{name}: {away} is not on this machine: not read, its tokens are guessed")
    return streams


def _reachable(config: EvaluateConfig, notes: list[str]) -> EvaluateConfig:
    """Without the benign test sets that would have to be downloaded."""
    here = []
    for source in config.benign:
        away = remote(StreamConfig(source=source))
        if away is None:
            here.append(source)
        else:
            notes.append(f"evaluate.benign: {source} ({away}) was not read")
    return config.model_copy(update={"benign": here})


def dry_scoring(found: Dry, source: StreamConfig, models: int) -> tuple[int, float]:
    """(rows, seconds on this CPU or 0) of scoring all rows of a source by `models` models of the kind of a dry run's."""
    prepared = found.prepared
    lengths = Lengths(prepared)
    with offline():
        rows = lengths.rows(source.source)
    tokens = models * len(rows) * lengths.mean([row["messages"] for row in some(rows)])
    passes = models * max(1.0, tokens / prepared.config.batch.micro_tokens)
    return len(rows), sum(_seconds(prepared.config, Load(forwarded=tokens, passes=passes), 1))


# ------------------------------------------------------------------------------------------------ time and memory


def _seconds(config: RunConfig, load: Load, jobs: int) -> tuple[float, float]:
    """See `Work.seconds`. Only where a CPU will train, with a model whose dimensions are known."""
    import torch

    shape = _shape(config.model.model_dump_json(), model_path(config))
    if shape is None or shape.parameters > 1e9 or torch.cuda.is_available():
        return (0.0, 0.0)
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
    need = memory(config, shape, cuda=cuda, references=frozen, longest=longest, samples=will_sample(prepared))
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
