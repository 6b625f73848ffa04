"""The reward contract (TRL's): load functions by name, call them, check and combine what they return; and what rewards are
made of: reading answers, scanning generated Python, asking a grader."""

from rlsafe.rewards.graded import Rubric, check_grader, graded
from rlsafe.rewards.loading import LoadedReward, load_reward
from rlsafe.rewards.python_security.code import extract_python, is_code
from rlsafe.rewards.python_security.static import Finding, Scan, scan_answer, severity_score
from rlsafe.rewards.registry import registered_rewards, reward
from rlsafe.rewards.runner import RewardBatch, RewardRunner
from rlsafe.rewards.text import answer_text, is_repetitive, question_text

__all__ = [
    "Finding",
    "LoadedReward",
    "RewardBatch",
    "RewardRunner",
    "Rubric",
    "Scan",
    "answer_text",
    "check_grader",
    "extract_python",
    "graded",
    "is_code",
    "is_repetitive",
    "load_reward",
    "question_text",
    "registered_rewards",
    "reward",
    "scan_answer",
    "severity_score",
]
