"""Local files of rows: .jsonl, .json, .csv, .parquet. Every reader yields `(where, row)`, where `where` is "file:line".

What is wrong with a single row is yielded in its place as a UserError, so that the caller can stop or go on; what makes
the file unreadable is raised.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlsafe.config import UserError, first_line
from rlsafe.data.rows import kind_of

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")

Found = tuple[str, Any]
"""(where, a raw row or the UserError that says why there is none)"""


def read_file(path: Path) -> Iterator[Found]:
    """The rows of a file of one of `SUFFIXES`, in order."""
    return {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}[path.suffix.lower()](path)


def _jsonl(path: Path) -> Iterator[Found]:
    with path.open("rb") as file:  # bytes are cut at \n alone: text mode would also cut at a lone \r inside a row
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                where = f"{path}:{number}"
                yield where, _json_line(line, where)


def _json_line(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return UserError(f"{where}: not UTF-8 text ({error.reason}); save the file as UTF-8")
    except json.JSONDecodeError as error:
        return UserError(f"{where}: not JSON: {error.msg} at column {error.colno}; expected one object per line")
    except RecursionError:
        return UserError(f"{where}: not a usable row: nested too deeply")
    except ValueError:  # Python refuses integers of thousands of digits
        return UserError(f"{where}: not a usable row: it holds a number of too many digits")


def _text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 text ({error.reason}); save the file as UTF-8") from None


def _json(path: Path) -> Iterator[Found]:
    text = _text(path)
    try:
        rows = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        lines = "; one object per line belongs in a .jsonl file" if error.msg == "Extra data" else ""
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}{lines}") from None
    except RecursionError:
        raise UserError(f"{path}: not a usable dataset: nested too deeply") from None
    except ValueError:
        raise UserError(f"{path}: not a usable dataset: it holds a number of too many digits") from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a list of row objects, got {kind_of(rows)}")
    for number, row in enumerate(rows, 1):
        yield f"{path} row {number}", row


def _csv(path: Path) -> Iterator[Found]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    header: list[str] = []
    line = 1  # where the record at hand begins: a quoted cell may span lines
    try:
        for cells in reader:
            where, line = f"{path}:{line}", reader.line_num + 1
            if not cells:
                continue
            if not header:
                header = cells
                twice = sorted({name for name in header if header.count(name) > 1})
                if twice:
                    raise UserError(f"{where}: the column {twice[0]!r} appears twice in the header")
                continue
            if len(cells) != len(header):
                yield where, UserError(f"{where}: {len(cells)} cells where the header has {len(header)} columns")
                continue
            # an empty cell of an optional column is a missing value, not an empty string
            named = zip(header, cells, strict=True)
            yield where, {name: cell if cell or name == "prompt" else None for name, cell in named}
    except csv.Error as error:
        raise UserError(f"{path}:{line}: not valid CSV: {error}") from None


def _parquet(path: Path) -> Iterator[Found]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=4096):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable parquet file: {first_line(error)}") from None
