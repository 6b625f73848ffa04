"""Short runs over the tiny model: the kinds that tests vary, and what they left behind."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from rlsafe.config import run_from_tree
from rlsafe.engine.run.life import run

MIXED: dict[str, Any] = {
    "schedule": {"steps": 6, "phases": [{"steps": 2, "cycle": ["sft"]}, {"cycle": ["grpo", "grpo", "sft"]}]},
    "defenses": [{"kl": {"weight": 0.5}}, {"interleaving": {"fraction": 0.2}}],
}
SFT: dict[str, Any] = {"defenses": [{"kl": {"weight": 0.5}}]}
GRPO: dict[str, Any] = {"schedule": {"steps": 4, "phases": [{"cycle": ["grpo"]}]}}


def tree_with(tree: dict[str, Any], *changes: dict[str, Any]) -> dict[str, Any]:
    tree = copy.deepcopy(tree)
    for change in changes:
        for key, value in change.items():
            tree[key] = {**tree.get(key, {}), **value} if isinstance(value, dict) else value
    return tree


def adapter(out: Path) -> dict[str, torch.Tensor]:
    return load_file(str(out / "adapter" / "adapter_model.safetensors"))


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def train(tree: dict[str, Any], out: Path, **arguments) -> dict[str, torch.Tensor]:
    run(run_from_tree(tree), out, **arguments)
    return adapter(out)
