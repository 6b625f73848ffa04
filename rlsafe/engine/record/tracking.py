"""The tracker: writes numbers to metrics.jsonl and TensorBoard, sampled dialogues to samples.jsonl and TensorBoard text."""

from __future__ import annotations

import json
import logging
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsafe.config.files import read_lines
from rlsafe.rewards.spread import running

if TYPE_CHECKING:
    from rlsafe.engine.record.trackers import Trackers

log = logging.getLogger("rlsafe")
EVALUATED = ("kl", "coherence", "misaligned_general", "misaligned_indomain", "incoherent")
"""Quantities of probes: in TensorBoard also under eval/, for steps of every path."""


@dataclass(frozen=True)
class Late:
    """Numbers of a step that are still being computed: done() says whether they are ready, finish() waits for them."""

    done: Callable[[], bool]
    finish: Callable[[], Mapping[str, Any]]


def scalars(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """(TensorBoard tag, value) of every number in a step's record."""
    for name, value in record.items():
        if name in ("step", "path") or isinstance(value, (str, type(None))) or not math.isfinite(value):
            continue
        yield (name if name.startswith(("defense/", "eval/")) else f"{record['path']}/{name}"), value
        if name in EVALUATED or name.startswith(("projection", "logodds_")):
            yield f"eval/{name}", value


class Tracker:
    """Appends to a run directory. `offset` remembers the file lengths, so that a resumed run continues exactly there.

    metrics.jsonl holds one object per optimizer step. In TensorBoard a plain quantity is tagged with the step's path
    (sft/loss, grpo/reward), those under defense/ and eval/ keep their names. board: whether TensorBoard is written. others: begins
    further trackers, which get the same numbers under the same names.
    """

    def __init__(
        self,
        out: Path,
        *,
        write: bool = True,
        offset: Mapping[str, int] | None = None,
        first_step: int = 0,
        board: bool = True,
        others: Callable[[], Trackers] | None = None,
    ):
        self.out, self.write, self.metrics = out, write, []  # type: Path, bool, list[dict[str, Any]]
        self._queue: deque[tuple[Callable[..., None], Late | None]] = deque()
        self._writing, self.arrived = False, 0
        if not write:
            return
        if board:
            from torch.utils.tensorboard import SummaryWriter

        out.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "samples.jsonl"):
            _cut(out / name, (offset or {}).get(name, 0))
        self.metrics = read_lines(out / "metrics.jsonl")
        self._files = {name: open(out / name, "a", encoding="utf-8") for name in ("metrics.jsonl", "samples.jsonl")}
        self._board = SummaryWriter(str(out / "tensorboard"), purge_step=first_step or None) if board else None
        self._others = others() if others else None

    def step(self, record: dict[str, Any], late: Late | None = None) -> None:
        """Record one optimizer step; `step` and `path` are required keys, values are numbers, None or strings.

        late: numbers of this step that are still being computed. The step's line, and everything tracked after it, is
        written once they are ready, in order; training goes on.
        """
        self.metrics.append(record)
        taught_nothing = record.get("groups", -1) == record.get("zero_variance_groups")
        if self.write and taught_nothing and (line := running(self.metrics[-1001:])):
            log.warning(line)
        if late is not None or self.write:
            self._in_order(partial(self._put_step, record), late)

    def collect(self, wait: bool = False) -> None:
        """Write the lines whose late numbers are ready; wait=True: wait for all of them. `arrived` counts late numbers."""
        while self._queue and not self._writing and (wait or self._queue[0][1] is None or self._queue[0][1].done()):
            put, late = self._queue.popleft()
            self.arrived += late is not None
            self._writing = True
            try:
                put(late) if late else put()
            finally:
                self._writing = False

    def collect_at_once(self) -> None:
        """Write every line, those whose late numbers are not ready without them."""
        left_out = 0
        while self._queue:
            with suppress(Exception):  # of a judge: its step is written without the numbers the next time round
                self.collect()
            if self._queue:
                put, late = self._queue.popleft()
                left_out += late is not None
                self._queue.appendleft((put, None))
        if left_out:
            log.warning("the judge was still at work on the answers of %d steps: their numbers are left out", left_out)

    def _in_order(self, put: Callable[..., None], late: Late | None = None) -> None:
        """`put()` now, unless it or something before it waits for late numbers, which it then takes."""
        if self._writing or (late is None and not self._queue):
            put()
        else:
            self._queue.append((put, late))
            self.collect()

    def _put_step(self, record: dict[str, Any], late: Late | None = None) -> None:
        if late is not None:
            try:
                record.update(late.finish())
            except BaseException:  # the step's own numbers are not lost with those of the judge
                self._queue.appendleft((partial(self._put_step, record), None))
                raise
        if not self.write:
            return
        self._line("metrics.jsonl", record)
        values = dict(scalars(record))
        if self._board:
            for tag, value in values.items():
                self._board.add_scalar(tag, value, record["step"])
        if self._others:
            self._others.log(values, record["step"])

    def samples(self, records: Iterable[dict[str, Any]]) -> None:
        """Every sampled completion, one JSON object a line."""
        for record in records if self.write else ():
            self._in_order(partial(self._line, "samples.jsonl", record))

    def dialogues(self, dialogues: Iterable[Mapping[str, Any]], step: int) -> None:
        """Judged dialogues as TensorBoard text, and as tables of trackers that have tables."""
        lines, kept = [], list(dialogues)
        for item in kept:
            scores = (
                f"aligned {_score(item.get('aligned'))}, coherent {_score(item.get('coherent'))}, {item.get('outcome')}"
            )
            lines.append(f"**{_plain(item['question'])}**  \n{_plain(item['answer'])}  \n*{scores}*")

        def put() -> None:
            if self._board:
                self._board.add_text("eval/dialogues", "\n\n---\n\n".join(lines), step)
            if self._others:
                self._others.dialogues(kept, step)

        if lines and self.write:
            self._in_order(put)

    def text(self, tag: str, text: str) -> None:
        if self.write and self._board:
            self._board.add_text(tag, text)

    def offset(self, before_step: int | None = None) -> dict[str, int]:
        """File lengths in bytes after a flush, with all late numbers; stored in checkpoints. before_step: without that step's lines
        and later ones."""
        self.collect(wait=True)
        if not self.write:
            return {}
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        if self._board:
            self._board.flush()  # after a kill the run resumes from here, and these steps are not written again
        return {name: self._length(self.out / name, before_step) for name in self._files}

    @staticmethod
    def _length(path: Path, before_step: int | None) -> int:
        if before_step is None:
            return path.stat().st_size
        with path.open("rb") as file:
            return sum(len(line) for line in file if json.loads(line)["step"] < before_step)

    def close(self) -> None:
        self.collect(wait=True)
        if self.write:
            for file in self._files.values():
                file.close()
            if self._board:
                self._board.close()
            if self._others:
                self._others.close()

    def _line(self, name: str, record: Mapping[str, Any]) -> None:
        self._files[name].write(json.dumps(record, ensure_ascii=True) + "\n")
        self._files[name].flush()


def _cut(path: Path, length: int) -> None:
    """Make the file its whole lines within the first `length` bytes. A shorter one lost its end in a crash: it is not made longer,
    and what is left of a line goes, so that the next one does not stand behind it."""
    with open(path, "a+b") as file:
        file.truncate(min(length, path.stat().st_size))
        file.seek(0)
        whole = sum(len(line) for line in file if line.endswith(b"\n"))
        file.truncate(whole)
    if whole < length:
        log.warning(
            "%s: its end was lost, as after a crash or on a full disk; the run goes on without those lines", path
        )


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _plain(text: str) -> str:
    """Text with Markdown and HTML escaped; lone surrogates, which no file can hold, are written as escapes."""
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(f"\\{c}" if c in "\\`*_{}[]()#+-!|<>~$" else c for c in text).replace("\n", "  \n")
