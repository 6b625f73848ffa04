"""What defenses cost: KL, LDIFS and persona together against no defense plus one measured frozen forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import frozen_plugin
import world
from race import Contender, race, ratios
from table import Result, shown

BLOCKS = {"organism": 4, "5m": 6}
HIDDEN = {"organism": 128, "5m": 256}


def penalties(scratch: Path, quick: bool, rounds: int) -> Result:
    """SFT steps of 16 rows with answers of 24 to 192 words, one thread, float32. Two floors: no defense plus a frozen forward with
    logits, as a KL needs them (the goal is measured against this one), and plus one that ends at the last hidden states."""
    result = Result(
        "penalties",
        [
            "model",
            "defenses",
            "s/step",
            "time / none",
            "/ (none + frozen forward)",
            "/ (none + frozen decoder)",
            "CPU time",
        ],
    )
    rows = world.varied_rows(2000)
    for name in ["organism"] if quick else ["organism", "5m"]:
        model = world.model_dir(name, scratch)
        plugin = {"plugins": [frozen_plugin.__file__]}
        three = [{"kl": {"weight": 0.5}}, {"ldifs": {"weight": 1.0}}, _persona(name, scratch)]
        arms = {
            "none": {},
            "none + frozen forward": {**plugin, "defenses": ["frozen-forward"]},
            "none + frozen decoder": {**plugin, "defenses": [{"frozen-forward": {"logprobs": False}}]},
            **{
                ", ".join(next(iter(d)) for d in three[:n]): {"defenses": three[:n]}
                for n in ((3,) if quick else (1, 2, 3))
            },
        }
        contenders = [
            Contender(arm, "contenders:rlsafe_run", {"tree": world.run_tree(model, "", **changes), "rows": rows})
            for arm, changes in arms.items()
        ]
        lanes = {
            lane.name: lane
            for lane in race(contenders, rounds if name == "5m" else 2 * rounds, warm=3)
            if result.took_part(name, lane)
        }
        if not {"none", "none + frozen forward", "none + frozen decoder"} <= set(lanes):
            continue
        none, floor, decoder = (lanes[arm] for arm in ("none", "none + frozen forward", "none + frozen decoder"))
        for lane in lanes.values():
            cells = [
                name,
                lane.name,
                f"{lane.median('wall'):.3f}",
                shown(ratios(lane, none)),
                shown(ratios(lane, floor)),
                shown(ratios(lane, decoder)),
            ]
            result.row([*cells, shown(ratios(lane, floor, "cpu"))], lane)
        last = list(lanes.values())[-1]
        share = ratios(last, floor)["median"]
        result.goal(f"{name}: {last.name} over none + frozen forward", share, "<= 1.1", share <= 1.1)
    return result


def _persona(name: str, scratch: Path) -> dict[str, Any]:
    """Steering by a random direction costs what steering by a real one costs."""
    import torch

    from rlsafe.defenses.persona import save_vectors

    file = scratch / f"{name}.safetensors"
    save_vectors(torch.randn(BLOCKS[name] + 1, HIDDEN[name], generator=torch.Generator().manual_seed(0)), file)
    return {"persona": {"vectors": str(file), "layer": 2, "alpha": 0.1}}
