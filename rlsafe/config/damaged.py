"""A run.json that is empty or cut short: the way on that loses nothing which the run left."""

from __future__ import annotations

from pathlib import Path

ANEW = "start over with --overwrite"


def way_on(run: Path, resume: str) -> str:
    """What to do with the run: `resume` where there are checkpoints to go on from. Without them it would begin anew, which replaces
    what it trained; if it was finished, that is whole."""
    if any((run / "checkpoints").glob("step-*")):
        return resume
    trained = next((name for name in ("adapter", "model") if (run / name).is_dir()), None)
    return (
        f"if the run was finished, delete run.json: its {trained}/ can be evaluated; else {ANEW}" if trained else ANEW
    )


def damaged_record(run: Path, resume: str = "go on with rlsafe train --resume") -> str:
    """The line for a run whose run.json is damaged."""
    return f"{run / 'run.json'}: empty or damaged, as after a crash or on a full disk; {way_on(run, resume)}"
