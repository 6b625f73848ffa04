"""A GRPO step with colocated vLLM: rlsafe, TRL's GRPOTrainer and a plain step, and what weight sync takes of rlsafe's step."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import world
from race import Contender, Lane, race, ratios
from table import Result, shown

MAX_TOKENS = {"organism": 40, "5m": 48}


def grpo(scratch: Path, quick: bool, rounds: int) -> Result:
    """8 prompts x 8 completions a step, one thread, float32, LoRA r 8."""
    result = Result(
        "grpo", ["model", "contender", "s/step", "tokens/s", "time / plain", "time / rlsafe", "CPU time / plain"]
    )
    rows = world.rows("medical/bad")
    for name in ["organism"] if quick else ["organism", "5m"]:
        model, tokens = world.model_dir(name, scratch), MAX_TOKENS[name]
        peer: dict[str, Any] = {"model": model, "rows": rows, "max_tokens": tokens}
        tree = world.run_tree(
            model, "", schedule={"steps": 100_000, "phases": [{"cycle": ["grpo"]}]},
            grpo={"generations": world.GROUP, "max_tokens": tokens}, sampler={"kind": "vllm"},
            rewards=[{"fn": f"{Path(world.__file__)}:distinct_words"}],
        )  # fmt: skip
        contenders = [
            Contender("plain step", "contenders:grpo_plain", peer),
            Contender("plain step, vLLM's own noise", "contenders:grpo_plain", peer | {"hastened": False}),
            Contender("plain step, unseeded requests", "contenders:grpo_plain", peer | {"seeded": False}),
            Contender("rlsafe", "contenders:rlsafe_run", {"tree": tree, "rows": rows}),
            Contender("TRL 1.16", "contenders:trl_grpo", peer),
        ]
        if quick or name == "5m":
            del contenders[1:3]
        lanes = [lane for lane in race(contenders, rounds) if result.took_part(name, lane)]
        _compare(result, name, {lane.name: lane for lane in lanes})
    return result


def _compare(result: Result, model: str, lanes: dict[str, Lane]) -> None:
    plain, ours = lanes.get("plain step"), lanes.get("rlsafe")
    for lane in lanes.values():
        rate = statistics.median(1 / seconds for seconds in lane.per_token("wall"))
        row = [model, lane.name, f"{lane.median('wall'):.3f}", f"{rate:.0f}"]
        row += [shown(ratios(lane, plain)) if plain else "", shown(ratios(lane, ours)) if ours else ""]
        result.row([*row, shown(ratios(lane, plain, "cpu")) if plain else ""], lane)
    if ours is None:
        return
    if plain is not None:
        throughput = 1 / ratios(ours, plain)["median"]
        result.goal(f"{model}: rlsafe's throughput over a plain step's", throughput, ">= 0.80", throughput >= 0.8)
    if (trl := lanes.get("TRL 1.16")) is not None:
        ahead = ratios(trl, ours)["median"]
        result.goal(f"{model}: TRL's time over rlsafe's", ahead, "> 1.0", ahead > 1)
    sync = statistics.median(unit["sync"] / unit["wall"] for unit in ours.units)
    result.goal(f"{model}: weight sync, share of a GRPO step", sync, "<= 0.05", sync <= 0.05)
