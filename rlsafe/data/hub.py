"""Rows through the `datasets` library: hub datasets, dataset directories, and files behind a URL."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rlsafe.config import UserError, nearest
from rlsafe.data.files import SUFFIXES, Found, read_file, suffix_of
from rlsafe.data.formats import without_nulls

BUFFER = 10_000
"""Rows that a streamed dataset is shuffled within."""
SAVED = ("dataset_info.json", "state.json", "dataset_dict.json")
"""Files by which a directory written with `save_to_disk` is known."""


def is_dataset_directory(path: Path) -> bool:
    """Whether `datasets` can make rows of this directory: saved by `save_to_disk`, or holding data files."""
    if any((path / name).is_file() for name in SAVED):
        return True
    return path.is_dir() and any(suffix_of(file) in SUFFIXES for file in path.rglob("*"))


def read_dataset(
    name: str,
    *,
    config: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    seed: int | None = None,
    talks: Collection[str] = (),
) -> Iterator[Found]:
    """Rows of a hub dataset (`org/name`) or of a directory, in order; a streamed one is shuffled when `seed` is given.

    split: a name or a slice such as `train[:10%]`; None = `train`, or the only one there is. talks: columns that hold
    conversations under names of their own. A gated dataset needs a token (`hf auth login`). Raises UserError for whatever
    `datasets` cannot load.
    """
    split_name, data = _open(name, config, split, revision, streaming)
    if streaming and seed is not None:
        data = data.shuffle(seed=seed, buffer_size=BUFFER)
    number = 0
    try:
        for row in data:
            number += 1
            yield f"{name} [{split_name}] row {number}", without_nulls(row, talks)
    except Exception as error:  # decoding and (when streaming) downloading happen here
        raise _failed(name, error) from None


def _open(name: str, config: str | None, split: str | None, revision: str | None, streaming: bool) -> tuple[str, Any]:
    import datasets

    path = Path(name).expanduser()
    saved = any((path / file).is_file() for file in SAVED)
    if saved and config:
        raise UserError(f"{name}: a directory written by `save_to_disk` has no configurations; leave out 'config'")
    if path.is_dir() and revision:
        raise UserError(f"{name}: a directory has no revisions; leave out 'revision'")
    try:
        if saved:
            data: Any = datasets.load_from_disk(str(path))
            data = data if split is None else _part(name, split, data)
            if streaming:
                data = _streamed(data)
        else:
            place = str(path) if path.is_dir() else name
            with _quiet():
                data = datasets.load_dataset(place, config, split=split, revision=revision, streaming=streaming)
    except UserError:
        raise
    except Exception as error:  # a boundary: builders, the network and the hub raise anything
        raise _failed(name, error) from None
    if not isinstance(data, Mapping):
        return split or "all", data
    if split is None and "train" not in data and len(data) > 1:
        raise UserError(f"{name}: has no split 'train'; set split to one of: {', '.join(map(str, data))}")
    chosen = "train" if "train" in data else next(iter(data))
    return chosen, data[chosen]


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, the hub client logs no line for each retry; the final error is reported in one line."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _part(name: str, split: str, data: Any) -> Any:
    """A split, or a slice of one, of what `save_to_disk` wrote. A set without splits has the one that it was taken from, or `train`."""
    from datasets import ReadInstruction, concatenate_datasets

    parts = data if isinstance(data, Mapping) else {re.split(r"[\[+]", str(data.split or "train"))[0]: data}
    if split in parts:
        return parts[split]
    try:
        pieces = ReadInstruction.from_spec(split).to_absolute({part: len(rows) for part, rows in parts.items()})
    except Exception:  # it asserts as well as raises
        asked = re.split(r"[\[+]", split)[0]
        what = "no slice of a split" if asked in parts else "unknown split"
        raise UserError(f"{name}: {what} {split!r}{nearest(asked, parts)}") from None
    return concatenate_datasets([parts[piece.splitname].select(range(piece.from_, piece.to)) for piece in pieces])


def _streamed(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {part: rows.to_iterable_dataset() for part, rows in data.items()}
    return data.to_iterable_dataset()


def _failed(name: str, error: Exception) -> UserError:
    """One line of what `datasets` says, and what to do where that is known."""
    text = " ".join(str(error).split()) or type(error).__name__
    hint = ""
    if "gated" in text.lower():
        hint = "; ask for access on its page and log in with `hf auth login`"
    elif isinstance(error, (ConnectionError, OSError)) or "offline" in text.lower():
        hint = "; download it and name the file or directory here (with `preset`, its columns still apply)"
    return UserError(f"{name}: cannot be loaded by `datasets`: {text[:300]}{hint}")


def download(url: str) -> Path:
    """The file behind an http(s) URL, in the cache of `datasets`."""
    from datasets import DownloadConfig, DownloadManager

    try:
        return Path(str(DownloadManager(download_config=DownloadConfig(max_retries=2)).download(url)))
    except Exception as error:  # the network and the server raise anything
        raise _failed(url, error) from None


def read_url(url: str, talks: Collection[str] = ()) -> Iterator[Found]:
    """Rows of a file behind a URL; places read as `url:line`. UserError when it cannot be read."""
    suffix = suffix_of(url.partition("?")[0])
    if suffix not in SUFFIXES:
        raise UserError(
            f"{url}: files of type {suffix or 'without suffix'} cannot be read; expected {', '.join(SUFFIXES)}"
        )
    local = download(url)
    named = local if suffix_of(local) == suffix else _with_suffix(local, suffix)
    for where, row in read_file(named, talks):
        if isinstance(row, UserError):
            row = UserError(str(row).replace(str(named), url))
        yield where.replace(str(named), url), row


def _with_suffix(local: Path, suffix: str) -> Path:
    """A link to a cached file, whose own name is a digest, with the suffix that tells its type."""
    link = local.with_name(local.name + suffix)
    with suppress(FileExistsError):  # there from before, or another process was first
        link.symlink_to(local)
    return link
