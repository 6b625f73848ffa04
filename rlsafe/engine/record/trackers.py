"""Trackers beside the run directory, through Accelerate's own: `track.to: [tensorboard, wandb]`.

TensorBoard is written by `tracking.Tracker` itself, which a resumed run continues to the step. The others get the same numbers under
the same names, and dialogues as tables where they have tables (Weights & Biases).
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlsafe.config import RunConfig, UserError, first_line, nearest
from rlsafe.config.secrets import scrub_secrets
from rlsafe.config.trees import flatten

log = logging.getLogger("rlsafe")
BOARD = "tensorboard"
FOLDER = "trackers"
"""RUN/trackers holds what trackers keep on disk, and the id under which a resumed run goes on."""
COLUMNS = ["question", "answer", "aligned", "coherent", "outcome"]


def check_trackers(names: Iterable[str]) -> None:
    """UserError for a tracker that Accelerate does not know or whose package is not installed."""
    names = [name for name in names if name != BOARD]
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known = sorted({BOARD, *map(str, LOGGER_TYPE_TO_CLASS)})
    builtin = {BOARD, "aim", "comet_ml", "mlflow", "wandb", "clearml", "dvclive", "swanlab", "trackio"}
    here = {str(getattr(one, "value", one)) for one in get_available_trackers()}
    for name in names:
        if name not in known:
            raise UserError(f"track.to: {name!r}: expected trackers that Accelerate knows{nearest(name, known)}")
        if name in builtin and name not in here:
            raise UserError(
                f"track.to: {name}: its package is not installed; expected: pip install {name.replace('_', '-')}"
            )


class Trackers:
    """Every tracker of `track.to` but TensorBoard, of one run. One that fails in training is left, with a warning; the run goes on."""

    def __init__(self, config: RunConfig, out: Path):
        self._open = {name: _start(name, config, out) for name in dict.fromkeys(config.track.to) if name != BOARD}

    def log(self, values: Mapping[str, float], step: int) -> None:
        """The numbers of one step, under TensorBoard's names."""
        for name, tracker in list(self._open.items()):
            self._try(name, lambda tracker=tracker: tracker.log(dict(values), step=step))

    def dialogues(self, dialogues: Sequence[Mapping[str, Any]], step: int) -> None:
        """Judged dialogues as a table, in trackers that have tables."""
        rows = [[dialogue.get(column) for column in COLUMNS] for dialogue in dialogues]
        for name, tracker in list(self._open.items()):
            if rows and hasattr(tracker, "log_table"):
                self._try(name, lambda t=tracker: t.log_table("eval/dialogues", columns=COLUMNS, data=rows, step=step))

    def close(self) -> None:
        for name, tracker in list(self._open.items()):
            self._try(name, tracker.finish)
        self._open = {}

    def _try(self, name: str, call: Any) -> None:
        try:
            call()
        except Exception as error:
            del self._open[name]
            log.warning("track.to: %s fails and gets nothing more: %s", name, scrub_secrets(first_line(error, 300)))


def _start(name: str, config: RunConfig, out: Path) -> Any:
    """A tracker of Accelerate's, begun, with the run's settings. UserError when it cannot begin."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    kind: Any = LOGGER_TYPE_TO_CLASS[name]
    folder = out / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    arguments = dict(config.track.init.get(name, {}))
    if name == "wandb":
        group = out.parent.parent.name if out.parent.name == "cells" else None
        own = {"name": out.name, "group": group, "dir": str(folder), "id": _identity(folder), "resume": "allow"}
        arguments = own | arguments
    if kind.requires_logging_directory:
        arguments = {"logging_dir": str(folder), **arguments}
    try:
        tracker = kind(config.track.project, **arguments)
        tracker.start()
        settings = flatten(config.model_dump(mode="json"))
        simple = (bool, int, float, str, type(None))
        tracker.store_init_configuration(
            {k: v if isinstance(v, simple) else json.dumps(v) for k, v in settings.items()}
        )
    except Exception as error:
        hint = "; expected: log in, or WANDB_MODE=offline" if name == "wandb" else ""
        raise UserError(f"track.to: {name}: cannot begin: {scrub_secrets(first_line(error, 300))}{hint}") from None
    return tracker


def _identity(folder: Path) -> str:
    """The id of the run at a tracker: of the run that is resumed, else a new one."""
    file = folder / "id"
    if not file.is_file():
        file.write_text(uuid.uuid4().hex[:12], "utf-8")
    return file.read_text("utf-8").strip()
