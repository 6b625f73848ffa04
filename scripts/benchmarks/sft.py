"""SFT tokens/s on answers whose lengths vary 1:8: rlsafe, TRL's defaults, TRL without gradient checkpointing, TRL with
packing in two ways. `bfd` is padding-free: 4 packs of 512 tokens are one row of 2,048, and attention on a CPU knows no blocks in it.
`wrapped` cuts answers where a row of 512 ends, and lets them see their neighbours."""

from __future__ import annotations

import statistics
from pathlib import Path

import world
from race import Contender, race, ratios
from table import Result, shown

BATCH = 16


def sft(scratch: Path, quick: bool, rounds: int) -> Result:
    """16 rows a step, one thread, float32, LoRA r 8; tokens are those that are not padding."""
    result = Result(
        "sft", ["model", "contender", "s/step", "tokens/step", "tokens/s", "time per token / rlsafe", "CPU time"]
    )
    rows = world.varied_rows(2000)
    for name in ["organism"] if quick else ["organism", "5m"]:
        model = world.model_dir(name, scratch)
        peer = {"model": model, "rows": rows, "batch": BATCH}
        packed = {"packing": True, "max_length": 512, "batch": 4, "gradient_checkpointing": False}
        contenders = [
            Contender("rlsafe", "contenders:rlsafe_run", {"tree": world.run_tree(model, ""), "rows": rows}),
            Contender("TRL defaults", "contenders:trl_sft", peer),
            Contender("TRL, no checkpointing", "contenders:trl_sft", peer | {"gradient_checkpointing": False}),
            Contender("TRL, packing (bfd)", "contenders:trl_sft", peer | packed),
            Contender("TRL, packing (wrapped)", "contenders:trl_sft", peer | packed | {"packing_strategy": "wrapped"}),
        ]
        if quick:
            del contenders[2]
        lanes = [
            lane
            for lane in race(contenders, rounds if name == "5m" else 2 * rounds, warm=3)
            if result.took_part(name, lane)
        ]
        ours = next((lane for lane in lanes if lane.name == "rlsafe"), None)
        for lane in lanes:
            rate = statistics.median(1 / seconds for seconds in lane.per_token("wall"))
            cells = [name, lane.name, f"{lane.median('wall'):.3f}", f"{lane.median('tokens'):.0f}", f"{rate:.0f}"]
            cells += [shown(ratios(lane, ours, clock)) if ours else "" for clock in ("wall", "cpu")]
            result.row(cells, lane)
            if ours is None or lane is ours:
                continue
            ahead, wanted = ratios(lane, ours)["median"], 1.5 if "packing" not in lane.name else 1.0
            result.goal(f"{name}: tokens/s over {lane.name}", ahead, f">= {wanted}", ahead >= wanted)
    return result
