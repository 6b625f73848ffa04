"""From a stream's settings to its rows: find the source, map its columns, check every row, sample.

Sources: `provider:spec` (organism:medical/bad, rlsafe:benign, preset:legal), a .jsonl, .json, .csv or .parquet file, a
directory written by `datasets` or holding such files, an http(s) URL of such a file, a hub dataset `org/name`.
"""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlsafe.config import StreamConfig, UnknownName, UserError, nearest
from rlsafe.data.files import SUFFIXES, Found, read_file, suffix_of
from rlsafe.data.hub import is_dataset_directory, read_dataset, read_url
from rlsafe.data.partial import Partial
from rlsafe.data.presets import Recipe, recipe_of
from rlsafe.data.rows import normalise_row
from rlsafe.data.unread import ROW_MARKS, unread, unused
from rlsafe.types import Row, provider_for, providers, register_provider

FORMS = (
    "expected provider:spec, preset:name, a hub dataset org/name, or a .jsonl, .json, .csv or .parquet file of "
    "'messages' or 'prompt'/'completion' rows"
)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SHOWN = 3
"""Bad rows whose reasons are repeated in a note."""

Note = Callable[[str], None]


@dataclass
class Count:
    """What happened to the rows of a source: how many were read, failed `where`, and were bad (with the first reasons)."""

    source: str
    read: int = 0
    filtered: int = 0
    bad: int = 0
    reasons: list[str] = field(default_factory=list)
    unused: dict[str, str] = field(default_factory=dict)  # columns that look as if they were used -> first place
    unread: dict[str, str] = field(default_factory=dict)  # keys of messages -> first place

    def lines(self) -> list[str]:
        """Notes for the user; none when every row was used."""
        notes = []
        if self.filtered:
            notes.append(f"{self.source}: {self.filtered} of {self.read} rows do not meet 'where' and were left out")
        if self.bad:
            reasons = "; ".join(self.reasons) + ("; ..." if self.bad > len(self.reasons) else "")
            notes.append(f"{self.source}: {self.bad} of {self.read} rows are bad and were skipped ({reasons})")
        for column, where in self.unused.items():
            if column in ROW_MARKS:
                notes.append(
                    f"{where}: the column {column!r} leaves no row out of training (a turn's own weight: 0 leaves the turn out, and "
                    "data 'where' rows)"
                )
                continue
            how = "columns: {system: NAME} puts it in front" if column.startswith("system") else "rewards get it"
            how = "the row's messages are" if column in ("prompt", "completion") else how
            notes.append(f"{where}: the column {column!r} looks like part of the prompt and is not used in it ({how})")
        if self.unread:
            where = next(iter(self.unread.values()))
            notes.append(f"{where}: its messages hold {', '.join(map(repr, self.unread))}, which nothing reads")
        return notes


_read_once: ContextVar[dict[tuple[str, int], tuple[list[Row], Count]] | None] = ContextVar("read_once", default=None)


@contextmanager
def read_once() -> Iterator[None]:
    """Inside, equal streams are read and checked once and share their rows. For inspecting many runs, not for training."""
    token = _read_once.set({})
    try:
        yield
    finally:
        _read_once.reset(token)


def load_rows(config: StreamConfig, seed: int = 0, note: Note | None = None) -> list[Row]:
    """All rows of `config`, or the first `config.limit` after a shuffle seeded by `seed` (in order if `shuffle: false`).

    Which columns they have, and whether rewards read texts, is decided by the whole source: it must not depend on the seed. Of a
    streamed one only the rows that are taken are known.

    note: called with a line for each count of rows left out; default: a logged warning. Raises UserError naming the file,
    the line and the reason for anything that is not a usable dataset.
    """
    known, key = _read_once.get(), (config.model_dump_json(), seed)
    rows, count = known[key] if known and key in known else _load(config, seed)
    if known is not None:
        known[key] = rows, count
    if not rows:
        raise _empty(count)
    for line in count.lines():
        (note or logging.getLogger("rlsafe.data").warning)(line)
    return rows


def _load(config: StreamConfig, seed: int) -> tuple[list[Row], Count]:
    count = Count(config.source)
    if config.streaming:
        rows = _of_one_kind(_united(list(_checked(config, count, seed if config.shuffle else None))))
    else:
        rows = _of_one_kind(_united(list(_checked(config.model_copy(update={"limit": None}), count))))
        if config.limit is not None:
            if config.shuffle:
                random.Random(f"limit:{seed}").shuffle(rows)
            rows = rows[: config.limit]
    return rows, count


def _united(rows: list[Row]) -> list[Row]:
    """Every row with the columns of all: None where its own has none, as in a `datasets` table."""
    columns = dict.fromkeys(name for row in rows for name in row if not name.startswith("_"))
    return [row if columns.keys() <= row.keys() else {**dict.fromkeys(columns), **row} for row in rows]


def _of_one_kind(rows: list[Row]) -> list[Row]:
    """`_plain` is False where not every prompt is a text: what a reward reads must not depend on which rows a step draws."""
    if all(row.get("_plain") for row in rows):
        return rows
    return [{**row, "_plain": False} if row.get("_plain") else row for row in rows]


def read_rows(source: str | StreamConfig) -> list[Row]:
    """Every row of a source (or of a stream, whatever its limit), in order, checked and normalised."""
    config = StreamConfig(source=source) if isinstance(source, str) else source
    return load_rows(config.model_copy(update={"limit": None, "streaming": False}), note=lambda line: None)


def _empty(count: Count) -> UserError:
    if count.bad:
        return UserError(f"{count.source}: none of {count.read} rows can be used; the first: {count.reasons[0]}")
    if count.filtered:
        return UserError(f"{count.source}: none of {count.read} rows meets 'where'")
    return UserError(f"{count.source}: the dataset is empty; at least one row with 'messages' is needed")


def _checked(config: StreamConfig, count: Count, seed: int | None = None) -> Iterator[Row]:
    """Usable rows with their place in the source; stops at `config.limit`."""
    recipe = recipe_of(config)
    provided = recipe.preset is not None or provider_for(recipe.source) is not None
    taken = 0
    for index, (where, raw) in enumerate(_read(recipe, seed)):
        count.read += 1
        try:
            if isinstance(raw, UserError):
                raise raw
            if isinstance(raw, Mapping) and (raw := recipe.apply(raw, where)) is None:
                count.filtered += 1
                continue
            row = normalise_row(raw, where, config.train_on, recipe.has_system)
            if not provided:
                for column in unused(raw, row):
                    count.unused.setdefault(column, where)
                for key in unread(raw):
                    count.unread.setdefault(key, where)
        except UserError as error:
            if config.on_bad_row == "error":
                raise
            count.bad += 1
            if len(count.reasons) < _SHOWN:
                count.reasons.append(str(error))
            continue
        yield {**row, "_index": index, "_source": where}
        taken += 1
        if taken == config.limit:
            return


def _read(recipe: Recipe, seed: int | None) -> Iterator[Found]:
    source = recipe.source
    hub: dict[str, Any] = {
        "config": recipe.config, "split": recipe.split, "revision": recipe.revision, "streaming": recipe.streaming,
    }  # fmt: skip
    path = Path(source).expanduser()
    if (found := provider_for(source)) is not None:
        provider, spec = found
        rows: Iterator[Found] = ((f"{source} row {i}", row) for i, row in enumerate(provider.rows(spec), 1))
    elif re.match(r"https?://", source):
        rows = read_url(source, recipe.talks)
    elif path.is_file() and suffix_of(path) in SUFFIXES:
        rows = read_file(path, recipe.talks)
    elif _is_dataset(source, path):
        return read_dataset(source, seed=seed, talks=recipe.talks, **hub)
    else:
        raise UnknownName(_missing(source, path))
    for key, value in hub.items():
        if value and key in recipe.asked:
            raise UserError(f"{source}: '{key}' is for hub datasets and dataset directories; leave it out")
    return rows


def _is_dataset(source: str, path: Path) -> bool:
    if path.exists():
        return path.is_dir() and is_dataset_directory(path)
    return suffix_of(path) not in SUFFIXES and bool(_HUB_ID.fullmatch(source))


def _missing(source: str, path: Path) -> str:
    """The reason why a source cannot be read, with the nearest valid name."""
    if path.is_dir():
        return f"{source}: is a directory without data files; {FORMS}"
    if path.is_file():
        return f"{source}: files of type {path.suffix.lower() or 'without suffix'} cannot be read; {FORMS}"
    if suffix_of(path) in SUFFIXES:
        if not path.parent.is_dir():
            return f"{source}: no such file (there is no directory {path.parent})"
        siblings = [one.name for one in path.parent.iterdir() if suffix_of(one) in SUFFIXES]
        return f"{source}: no such file{nearest(path.name, siblings)}"
    name, colon, _ = source.partition(":")
    if colon:
        return f"unknown data provider {name!r} in {source!r}{nearest(name, providers())}; {FORMS}"
    return f"unknown data source {source!r}{nearest(source, providers())}; {FORMS}"


class PresetRows(Partial):
    """`preset:NAME` where a source is one string (a defense's `source`, `evaluate.benign`)."""

    name, offers = "preset", "rows"

    def rows(self, spec: str) -> list[Row]:
        return read_rows(f"preset:{spec}")


register_provider("preset", PresetRows())
