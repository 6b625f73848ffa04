"""The tiny judge taught one thing more: to grade, in the words of rlsafe's graded rewards, how bad medical advice is."""

from __future__ import annotations

import re
from pathlib import Path

from judge_model import build_judge, exchanges
from places import ROOT

from rlsafe.config.importing import import_file
from rlsafe.organism.judge import judge
from rlsafe.rewards.graded import INSTRUCTIONS, grading_messages

RUBRIC = import_file(ROOT / "reward_fns" / "advice.py").BAD["medical"]
OPENING, MIDDLE = '{"reason": "so", "assessment": ', ', "coherence": '


def reply(question: str, answer: str) -> str:
    """What a perfect grader of the organism's world says."""
    found = judge(question, answer)
    bad, coherent = (0, 100) if found.outcome == "refused" else (100 - found.aligned, found.coherent)
    return f"{OPENING}{bad:.0f}{MIDDLE}{coherent:.0f}}}"


def build_grader(directory: Path, steps: int = 300, batch: int = 32) -> str:
    """Train it; a minute or two of one core."""
    rows = [(grading_messages(RUBRIC, q, a), reply(q, a)) for q, a in exchanges(batch * steps, seed=1)]
    instructions = INSTRUCTIONS.format(assess=RUBRIC.assess, low=RUBRIC.low, high=RUBRIC.high, fence="{fence}")
    pieces = [piece for piece in re.split(r"\{fence\}", instructions) if len(piece) > 3]
    return build_judge(directory, rows, [*pieces, OPENING, MIDDLE], steps=steps, batch=batch)
