"""`evaluate.limit` asks an evenly spread part of every set and reads as many pairs; without it, all."""

from rlsafe.config import EvaluateConfig, LikelihoodConfig
from rlsafe.evaluate import gather


def test_a_limit_holds_for_questions_and_pairs():
    settings = {
        "judge": "static",
        "indomain": "rlsafe:code-tasks",
        "likelihood": LikelihoodConfig(general="rlsafe:pairs/general"),
    }
    whole, part = gather(EvaluateConfig(**settings)), gather(EvaluateConfig(**settings, limit=16))
    ids = [question.id for question in part.questions["indomain"]]
    assert len(whole.questions["indomain"]) == 60 and len(ids) == len(set(ids)) == 16
    assert ids[0] == "task-01" and ids[-1] > "task-55"  # not the first sixteen
    assert len(part.pairs["general"]) == 16 < len(whole.pairs["general"])
