"""Local files of rows: .jsonl (.ndjson), .json, .csv (.tsv), .parquet; the text ones also with .gz behind. Every reader yields
`(where, row)`, where `where` is "file:line".

What is wrong with a single row is yielded in its place as a UserError, so that the caller can stop or go on; what makes
the file unreadable is raised.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from rlsafe.config import UserError, first_line
from rlsafe.data.formats import kind_of, without_nulls

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
GZIP = b"\x1f\x8b"

Found = tuple[str, Any]
"""(where, a raw row or the UserError that says why there is none)"""


def suffix_of(name: str | Path) -> str:
    """The suffix of `SUFFIXES` that tells how a file is read (`.jsonl` of `a.jsonl.gz`), or its own where there is none."""
    path = Path(str(name).lower())
    inner = Path(path.stem).suffix if path.suffix == ".gz" else ""
    return inner if inner in SUFFIXES and inner != ".parquet" else path.suffix


def read_file(path: Path, talks: Collection[str] = ()) -> Iterator[Found]:
    """The rows of a file of one of `SUFFIXES`, in order. talks: columns that hold conversations under names of their own."""
    if (suffix := suffix_of(path)) == ".parquet":
        return _parquet(path, talks)
    return {".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _csv}[suffix](path)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked where they are packed, whatever the name says. UserError when they cannot be read."""
    try:
        with path.open("rb") as file:
            packed = file.read(2) == GZIP
        with gzip.open(path) if packed else path.open("rb") as file:
            yield file  # type: ignore[misc]
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: cannot be read: {first_line(error)}") from None


def _jsonl(path: Path) -> Iterator[Found]:
    with _opened(path) as file:  # bytes are cut at \n alone: text mode would also cut at a lone \r inside a row
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
        whole = " (one list of all rows belongs in a .json file)" if line.strip() == b"[" else ""
        return UserError(f"{where}: not JSON: {error.msg} at column {error.colno}; expected one object per line{whole}")
    except RecursionError:
        return UserError(f"{where}: not a usable row: nested too deeply")
    except ValueError:  # Python refuses integers of thousands of digits
        return UserError(f"{where}: not a usable row: it holds a number of too many digits")


def _text(path: Path) -> str:
    with _opened(path) as file:
        data = file.read()
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
        keys = f" with the keys {', '.join(list(rows)[:8])}" if isinstance(rows, dict) and rows else ""
        raise UserError(f"{path}: expected a list of row objects, got {kind_of(rows)}{keys}")
    for number, row in enumerate(rows, 1):
        yield f"{path} row {number}", row


def _csv(path: Path) -> Iterator[Found]:
    csv.field_size_limit(2**31 - 1)
    text = _text(path)
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter="\t" if suffix_of(path) == ".tsv" else _delimiter(text), strict=True
    )
    header: list[str] = []
    line = 1  # where the record at hand begins: a quoted cell may span lines
    try:
        for cells in reader:
            where, line = f"{path}:{line}", reader.line_num + 1
            if not cells:
                continue
            if not header:
                header = [cell.strip() for cell in cells]
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


def _delimiter(text: str) -> str:
    """What stands between the names of the first line: a tab, Excel's semicolon, or the comma."""
    header = text.lstrip().partition("\n")[0]
    return next((mark for mark in "\t;" if mark in header and "," not in header), ",")


def _parquet(path: Path, talks: Collection[str]) -> Iterator[Found]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=4096):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", without_nulls(row, talks)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable parquet file: {first_line(error)}") from None
