"""Resuming an interrupted evaluation: sampled answers are written to a journal as they come.

The journal is `.answers.jsonl` beside the results. Its first line is a digest of the weights and requests, so that answers
of another model or other settings are never used. It is deleted once the results are saved. Judgements are not in it: an
LLM judge saves its replies itself.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rlsafe.config import RunConfig
from rlsafe.config.files import file_hash, write_text
from rlsafe.config.gguf import gguf_file, is_gguf
from rlsafe.evaluate.ask.asking import Answer, Planned, complete
from rlsafe.types import RunError, Sampler

NAME = ".answers.jsonl"
PART = 1024
"""Answers sampled before they are written down; a question is never split."""
WEIGHTS = ("adapter", "model")
"""Directories in which a finished run keeps what it trained."""

Place = tuple[str, str, int]


def identity(config: RunConfig, run: Path | None) -> str:
    """A digest of the weights: the model's name (a local one's files by size and time) and what the run trained; without a run, the
    adapter that the settings name."""
    found = hashlib.sha256(json.dumps(config.model.model_dump(mode="json")).encode())
    local = Path(config.model.name)
    if is_gguf(config.model.name):
        found.update(file_hash(gguf_file(config.model.name)).encode())
    if local.is_dir():
        found.update(repr(sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in local.iterdir())).encode())
    trained = [run / name for name in WEIGHTS] if run else [Path(config.model.adapter)] if config.model.adapter else []
    for file in sorted(file for directory in trained for file in directory.rglob("*") if file.is_file()):
        found.update(file.name.encode())
        with file.open("rb") as content:
            found.update(hashlib.file_digest(content, "sha256").digest())
    return found.hexdigest()


def _key(planned: Sequence[Planned], weights: str, sampler: str, max_tokens: int) -> str:
    """A digest of everything that decides the answers."""
    found = hashlib.sha256(f"{weights}|{sampler}|{max_tokens}".encode())
    for one in planned:
        found.update(repr((_place(one), one.temperature, one.request.seed, one.request.prompt_ids)).encode())
    return found.hexdigest()


def _place(one: Planned | Answer) -> Place:
    return (one.set, one.question_id, one.sample)


class Journal:
    """Answers by their place in the plan, read back from `directory` if they are of the same `key`, else a new journal is begun."""

    def __init__(self, directory: Path, key: str):
        self.path = directory / NAME
        self.answers: dict[Place, dict[str, Any]] = {}
        if not self._read(key):
            write_text(self.path, json.dumps({"key": key}) + "\n")

    def _read(self, key: str) -> bool:
        if not self.path.is_file():
            return False
        lines = self.path.read_bytes().split(b"\n")
        whole = [line for line in lines[:-1] if line]  # text after the last newline is a line cut short
        try:
            records = [json.loads(line) for line in whole]
        except ValueError:
            return False
        if not records or records[0] != {"key": key}:
            return False
        self.answers = {(r["set"], r["question_id"], r["sample"]): r for r in records[1:]}
        write_text(self.path, b"\n".join(whole).decode() + "\n")
        return True

    def add(self, answers: Sequence[Answer]) -> None:
        """Append to the file. `meta` comes from the plan and is not written. RunError when they cannot be written."""
        lines = []
        for answer in answers:
            record = {f.name: getattr(answer, f.name) for f in dataclasses.fields(answer) if f.name != "meta"}
            lines.append(json.dumps(record) + "\n")
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(lines)
        except OSError as error:
            raise RunError(
                f"{self.path}: cannot be written: {error.strerror or error}; the answers before these {len(lines)} are kept: "
                "the same evaluation goes on from them when there is room"
            ) from None

    def get(self, one: Planned) -> Answer | None:
        record = self.answers.get(_place(one))
        return None if record is None else Answer(**record, meta=one.meta)

    def close(self) -> None:
        """Delete the journal; call it once the results are saved."""
        self.path.unlink(missing_ok=True)


def _parts(planned: Sequence[Planned]) -> Iterator[list[Planned]]:
    """Whole questions, up to PART answers at a time (one question may hold more)."""
    part: list[Planned] = []
    question: list[Planned] = []
    for one in planned:
        if question and (one.set, one.question_id) != (question[0].set, question[0].question_id):
            if part and len(part) + len(question) > PART:
                yield part
                part = []
            part += question
            question = []
        question.append(one)
    if part and len(part) + len(question) > PART:
        yield part
        part = []
    yield part + question


def complete_resumable(
    sampler: Sampler,
    tokenizer: Any,
    planned: Sequence[Planned],
    max_tokens: int,
    directory: Path,
    weights: str,
    say: Callable[[str], None],
) -> tuple[list[Answer], Journal]:
    """`complete`, going on where an interrupted call with the same weights and requests stopped. Close the journal once
    the results are saved."""
    journal = Journal(directory, _key(planned, weights, sampler.name, max_tokens))
    answers: list[Answer] = []
    if journal.answers:
        say(f"{len(journal.answers)} answers are there from an interrupted evaluation")
    for part in _parts(
        planned
    ):  # the same parts as in an uninterrupted call: which requests are sampled together can change last bits
        found = [answer for one in part if (answer := journal.get(one)) is not None]
        if len(found) < len(part):
            found = complete(sampler, tokenizer, part, max_tokens)
            journal.add(found)
        answers += found
        if len(answers) < len(planned):
            say(f"{len(answers)} of {len(planned)} answers sampled")
    return answers, journal
