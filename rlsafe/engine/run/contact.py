"""Before a command does anything slow: is there anybody behind the endpoints that it will ask?"""

from __future__ import annotations

from rlsafe.engine.run.build import Prepared, Resources
from rlsafe.rewards import check_grader
from rlsafe.types import BackgroundJudge


def contact(prepared: Prepared, resources: Resources) -> None:
    """Ask the run's judge and its rewards' graders once, each endpoint only until it has replied.

    UserError when one cannot be reached, or knows no such key or model: at the very first contact that is a mistake. An outage
    later is not (evaluate.judge.on_outage; a grader that is out gives no reward).
    """
    config = prepared.config
    asks = bool(config.evaluate.general or config.evaluate.indomain or any(d.judges for d in prepared.defenses))
    if asks and config.evaluate.judged:
        judge = resources.judge(config)
        if isinstance(judge, BackgroundJudge):
            judge.check(first=True)
    held_out = prepared.material.narrow if prepared.material else None
    runners = [runner for runner in (prepared.rewards, held_out.runner if held_out else None) if runner]
    for reward in (reward for runner in runners for reward in runner.rewards.values()):
        check_grader(reward.fn)
