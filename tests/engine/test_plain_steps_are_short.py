"""A plain step passes through few files and functions, and through no machinery that is off."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tiny_runs import GRPO, tree_with

import rlsafe
from rlsafe.config import run_from_tree
from rlsafe.engine.run.life import run

PACKAGE = Path(rlsafe.__file__).parent
OFF = {
    *("policy/sharding.py", "policy/zero3.py", "policy/quantize.py", "policy/taps.py", "policy/lora.py"),
    *("data/thinking.py", "data/control.py", "defenses/stack.py", "rewards/own.py", "rewards/spread.py"),
    "engine/record/trackers.py",
    *(f"engine/train/{name}.py" for name in ("ahead", "distributed", "faults", "effects", "gradients", "micro")),
    *(f"engine/train/{name}.py" for name in ("rescoring", "resample", "screening", "probing")),
}


def visited(tree, out) -> set[tuple[str, str]]:
    """(file, function) of the package that the third step of a run calls."""
    seen: set[tuple[str, str]] = set()

    def note(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(PACKAGE)) and not code.co_name.startswith("<"):
            seen.add((Path(code.co_filename).relative_to(PACKAGE).as_posix(), code.co_qualname))

    def progress(done, total, record):
        if done == 2:
            seen.clear()
        sys.setprofile(note if done == 2 else None)

    before = sys.getprofile()
    try:
        run(run_from_tree(tree), out, progress=progress)
    finally:
        sys.setprofile(before)
    return seen


@pytest.mark.parametrize(("path", "files", "functions"), [({}, 16, 68), (GRPO, 21, 101)], ids=["sft", "grpo"])
def test_a_plain_step_passes_few_files_and_functions(tiny_tree, tmp_path, path, files, functions):
    seen = visited(tree_with(tiny_tree, path), tmp_path / "run")
    opened = {file for file, _ in seen}
    assert opened & OFF == set()
    assert len(opened) <= files and len(seen) <= functions, "\n".join(map(str, sorted(seen)))
