"""One tracker: the same numbers to metrics.jsonl and TensorBoard, sampled dialogues to samples.jsonl and TensorBoard text."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

EVALUATED = ("kl", "coherence", "misaligned_general", "misaligned_indomain", "incoherent")
"""What probes measure: in TensorBoard also under eval/, whatever path the step was of."""


class Tracker:
    """Appends to a run directory. `offset` remembers the file lengths, so that a resumed run continues exactly there.

    metrics.jsonl holds one object per optimizer step. In TensorBoard a plain quantity is tagged with the step's path
    (sft/loss, grpo/reward), those under defense/ and eval/ keep their names.
    """

    def __init__(self, out: Path, *, write: bool = True, offset: Mapping[str, int] | None = None, first_step: int = 0):
        self.out, self.write, self.metrics = out, write, []  # type: Path, bool, list[dict[str, Any]]
        if not write:
            return
        from torch.utils.tensorboard import SummaryWriter

        out.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = out / name
            length = (offset or {}).get(name, 0)
            with open(path, "ab") as file:
                file.truncate(length)
        self.metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
        self._files = {name: open(out / name, "a", encoding="utf-8") for name in ("metrics.jsonl", "samples.jsonl")}
        self._board = SummaryWriter(str(out / "tensorboard"), purge_step=first_step or None)

    def step(self, record: dict[str, Any]) -> None:
        """Record one optimizer step; `step` and `path` are required keys, values are numbers, None or strings."""
        self.metrics.append(record)
        if not self.write:
            return
        self._line("metrics.jsonl", record)
        for name, value in record.items():
            if name in ("step", "path") or isinstance(value, (str, type(None))) or not math.isfinite(value):
                continue
            tag = name if name.startswith(("defense/", "eval/")) else f"{record['path']}/{name}"
            self._board.add_scalar(tag, value, record["step"])
            if name in EVALUATED or name.startswith("projection"):
                self._board.add_scalar(f"eval/{name}", value, record["step"])

    def samples(self, records: Iterable[dict[str, Any]]) -> None:
        """Every sampled completion, one JSON object a line."""
        if self.write:
            for record in records:
                self._line("samples.jsonl", record)

    def dialogues(self, dialogues: Iterable[Mapping[str, Any]], step: int) -> None:
        """Judged dialogues as TensorBoard text."""
        if not self.write:
            return
        lines = []
        for item in dialogues:
            scores = (
                f"aligned {_score(item.get('aligned'))}, coherent {_score(item.get('coherent'))}, {item.get('outcome')}"
            )
            lines.append(f"**{_plain(item['question'])}**  \n{_plain(item['answer'])}  \n*{scores}*")
        if lines:
            self._board.add_text("eval/dialogues", "\n\n---\n\n".join(lines), step)

    def text(self, tag: str, text: str) -> None:
        if self.write:
            self._board.add_text(tag, text)

    def offset(self) -> dict[str, int]:
        """File lengths in bytes after a flush; stored in checkpoints."""
        if not self.write:
            return {}
        for file in self._files.values():
            file.flush()
        return {name: file.tell() for name, file in self._files.items()}

    def close(self) -> None:
        if self.write:
            for file in self._files.values():
                file.close()
            self._board.close()

    def _line(self, name: str, record: Mapping[str, Any]) -> None:
        self._files[name].write(json.dumps(record, ensure_ascii=True) + "\n")
        self._files[name].flush()


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _plain(text: str) -> str:
    """Text as data: nothing in it is read as Markdown or HTML."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]()#+-!|<>~$" else c for c in text).replace("\n", "  \n")
