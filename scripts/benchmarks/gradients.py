"""What the gradient lever costs: a step whose gradient is seen whole, or in parts, against the same step without anybody looking."""

from __future__ import annotations

from pathlib import Path

import gradient_plugin
import world
from race import Contender, race, ratios
from table import Result, shown

KL = {"kl": {"weight": 0.5}}
ARMS = {
    "kl": [KL],
    "kl, gradient seen whole": [KL, "watch-gradient"],
    "kl, narrow rows and penalty apart": [KL, {"watch-gradient": {"parts": ["narrow", "penalty"]}}],
    "kl at half of the gradient": [{"kl": {"target_share": 0.5}}],
}


def gradients(scratch: Path, quick: bool, rounds: int) -> Result:
    """SFT steps of 16 rows with answers of 24 to 192 words, one thread, float32, under KL. Apart, the loss of a micro-batch and its
    penalty take a backward each."""
    result = Result("gradients", ["model", "defenses", "s/step", "time / kl", "CPU time / kl"])
    rows = world.varied_rows(2000)
    for name in ["organism"] if quick else ["organism", "5m"]:
        model, plugins = world.model_dir(name, scratch), [gradient_plugin.__file__]
        contenders = [
            Contender(
                arm,
                "contenders:rlsafe_run",
                {"tree": world.run_tree(model, "", plugins=plugins, defenses=defenses), "rows": rows},
            )
            for arm, defenses in ARMS.items()
        ]
        lanes = [lane for lane in race(contenders, rounds, warm=3) if result.took_part(name, lane)]
        alone = next((lane for lane in lanes if lane.name == "kl"), None)
        for lane in lanes if alone else ():
            cells = [name, lane.name, f"{lane.median('wall'):.3f}", shown(ratios(lane, alone))]
            result.row([*cells, shown(ratios(lane, alone, "cpu"))], lane)
    return result
