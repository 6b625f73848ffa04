"""The 18 traps found in public code (reference, section 4): each has tests that name it, in their name or their own text.

`PYTHONPATH=tests/support python tests/repo/test_traps_table.py` prints the table.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

from places import TESTS

TRAPS = {
    1: "LDIFS features without gradient",
    2: "padding in the feature distance, padding or prompt in a response mean",
    3: "a second KL by accident; a penalty that scales with accumulation",
    4: "which reference after an SFT warm-up",
    5: "an outage, bad JSON or an unclosed think block scored as an answer; one failure aborting the step",
    6: "wrong denominators, repeated headers, integer ids that do not match after a reload",
    7: "per-question settings ignored; sampling unseeded or with one seed for every step",
    8: "the inoculation prompt read by the grader; thresholds swapped",
    9: "steering that silently does nothing, or never reaches vLLM",
    10: "merging in place corrupts the base",
    11: "a failed sync leaves the sampler on the base model",
    12: "padding to the longest of all; full logits kept",
    13: "a resume that repeats data, resets seeds or loses a stream's position",
    14: "one temperature in the head for both paths",
    15: "SafeLoRA and biases; pairing modules by position",
    16: "an empty response makes a persona vector NaN; unsafe torch.load",
    17: "a stale prefix cache after a sync or a hook",
    18: "an auxiliary loss normalised per micro-batch, never logged, or dropped on a fast path",
}


def named(text: str) -> set[int]:
    """The trap numbers in a test's name or text: `test_trap_03_...`, "Trap 9", "Traps 9 and 17"."""
    found = set(map(int, re.findall(r"test_trap_(\d\d)_", text)))
    for group in re.findall(r"\b[Tt]raps? (\d+(?:(?:,| and|, and) (?:trap )?\d+)*)", text):
        found |= set(map(int, re.findall(r"\d+", group)))
    return found


def covered() -> dict[int, list[str]]:
    """Trap -> the tests that name it, read from the sources."""
    table: dict[int, list[str]] = defaultdict(list)
    for file in sorted(set(TESTS.rglob("test_*.py")) - {Path(__file__)}):
        source = file.read_text(encoding="utf-8")
        lines = source.splitlines()
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                for trap in named("\n".join(lines[node.lineno - 1 : node.end_lineno])):
                    table[trap].append(f"{file.stem}::{node.name}")
    return table


def test_every_trap_has_a_test_that_names_it():
    table = covered()
    assert not (missing := [trap for trap in TRAPS if not table[trap]]), f"no test names trap {missing}"
    assert set(table) <= set(TRAPS), f"there are {len(TRAPS)} traps"


def test_names_are_read_as_they_are_written():
    assert named("def test_trap_03_x(): ...") == {3} and named('"""Trap 16 and trap 2: no NaN"""') == {16, 2}
    assert named("Traps 9 and 17: on one engine") == {9, 17} and named("(trap 12)") == {12}
    assert not named("a trapdoor, 3 traps")


if __name__ == "__main__":
    for number, tests in sorted(covered().items()):
        print(f"{number:2d} {TRAPS[number]}", *(f"     {test}" for test in tests), sep="\n")
