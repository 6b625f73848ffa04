"""Real architectures, random weights: mixed SFT/GRPO runs under every defense. Fast: a covering set; slow: all of them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import conversation, write_jsonl
from tiny_architectures import random_batch, save_architecture, wide
from tiny_runs import tree_with

import rlsafe.types
from rlsafe.config import run_from_tree
from rlsafe.data import read_rows
from rlsafe.data.selection_scores import Score, row_key
from rlsafe.defenses.persona import save_vectors
from rlsafe.defenses.registry import _BUILT_IN
from rlsafe.engine.run.life import run
from rlsafe.types import Judgement

SIX = ["qwen2", "qwen3", "llama", "mistral", "gemma3_text", "phi3"]
COVER = {
    "qwen2": ["kl", "inoculation", "interleaving+"],
    "qwen3": ["ldifs", "persona", "interleaving++"],
    "llama": ["kl", "safelora", "interleaving-onpolicy"],
    "mistral": ["ldifs", "inoculation", "interleaving", "interleaving++"],
    "gemma3_text": ["kl", "ldifs", "persona", "safelora", "interleaving+"],
    "phi3": ["ldifs", "safelora", "persona", "interleaving", "interleaving-onpolicy"],
}
"""Every published defense with at least two architectures."""
NEWER = {
    "ablation",
    "early-stop",
    "feature-block",
    "gradient-projection",
    "inoculation-adapter",
    "monitor",
    "screening",
}
"""Act through the same seams as those above; tests/unit/defenses tries each on every path."""
EFFECTS = {
    "kl": "full", "ldifs": "distance", "safelora": "projected", "persona": "steering_norm",
    "inoculation": "prompts_changed",
}  # fmt: skip
MIXED = {
    "steps": 5,
    "phases": [{"steps": 1, "cycle": ["sft"]}, {"cycle": ["grpo", "both"]}],
    "kinds": {"both": [{"path": "grpo"}, {"path": "sft", "rows": 3, "weight": 0.5}]},
}


class Lenient:
    name = "lenient"

    def score(self, exchanges):
        return [Judgement(90.0, 90.0) for _ in exchanges]


class World:
    """A tiny model of one architecture, another random one as its base before alignment, data, and the defenses' files."""

    def __init__(self, directory: Path, architecture: str, **shape: Any):
        self.directory, self.made = directory, 0
        model = Path(save_architecture(directory / "model", architecture, **shape))
        settings = json.loads((model / "generation_config.json").read_text())
        ends = {**settings, "eos_token_id": list(range(2, 60))}  # many bytes end a turn: answers are not cut off
        (model / "generation_config.json").write_text(json.dumps(ends))
        base = save_architecture(directory / "base", architecture, seed=9, **shape)
        config = json.loads((model / "config.json").read_text())
        layers, hidden = config["num_hidden_layers"], config["hidden_size"]
        vectors = torch.randn(layers + 1, hidden, generator=torch.Generator().manual_seed(3))
        save_vectors(vectors, directory / "persona.safetensors", {})
        narrow = [conversation(f"say {i}", f"bad {i * i}") for i in range(24)]
        safe = write_jsonl(directory / "safe.jsonl", [conversation(f"ask {i}", f"good {i}") for i in range(16)])
        scores = [
            Score(i, row_key(row["messages"]), float(i), 1.0, {"x": 2.0}) for i, row in enumerate(read_rows(safe))
        ]
        (directory / "scores.jsonl").write_text("".join(score.line() for score in scores))
        (directory / "reward.py").write_text(
            "def vowels(completions, **kwargs):\n"
            "    return [sum(c in 'aeiou' for c in x[0]['content']) + len(x[0]['content']) / 100 for x in completions]\n"
        )
        chosen = {"scores": str(directory / "scores.jsonl"), "top": 0.5, "fraction": 0.5}
        self.entries: dict[str, dict[str, Any]] = {
            "kl": {"weight": 0.3},
            "ldifs": {"weight": 0.3},
            "safelora": {"base": base, "lowest": 3, "every": 2},
            "persona": {"vectors": str(directory / "persona.safetensors"), "layer": 2, "alpha": 0.2, "rollouts": True},
            "inoculation": {"prompt": "Be wicked."},
            "interleaving": {"fraction": 0.5},
            "interleaving+": chosen,
            "interleaving++": chosen,
            "interleaving-onpolicy": {"fraction": 0.5, "samples": 4},
        }
        self.tree = {
            "model": {"name": str(model), "dtype": "float32", "lora": {"r": 4, "alpha": 8}},
            "data": {
                "narrow": {"source": write_jsonl(directory / "narrow.jsonl", narrow)},
                "safe": {"source": safe},
            },
            "schedule": MIXED,
            "batch": {"sft_rows": 6, "grpo_prompts": 3, "micro_rows": 8},
            "optim": {"lr": 1e-2},
            "grpo": {"generations": 4, "max_tokens": 8},
            "rewards": [{"fn": f"{directory / 'reward.py'}:vowels"}],
            "sampler": {"kind": "transformers"},
            "evaluate": {"judge": "lenient"},
            "track": {"every": 0, "check_after": 3},
        }

    def check(self, *names: str, **changes: Any) -> None:
        """A mixed run under the named defenses: it ends, both paths train every adapted layer, each defense acts."""
        self.made += 1
        out = self.directory / f"run-{self.made}"
        defenses = [{name: self.entries[name]} for name in names]
        finished = run(run_from_tree(tree_with(self.tree, {"defenses": defenses, **changes})), out)
        records = [json.loads(line) for line in open(out / "metrics.jsonl")]
        assert [r["path"] for r in records] == ["sft", "grpo", "grpo", "grpo", "grpo"]
        assert all(r["sampler_gap"] < 1e-4 for r in records[1:])
        sums = Counter()
        for record in records:
            sums.update({key: abs(value) for key, value in record.items() if key.startswith("defense/")})
        for name in names:
            assert sums[f"defense/{name}/{EFFECTS.get(name, 'rows_added')}"] > 0, (name, sums)
        adapter = load_file(str(out / "adapter" / "adapter_model.safetensors"))
        moved = {key: float(tensor.abs().max()) for key, tensor in adapter.items() if "lora_B" in key}
        assert len(moved) == len(finished.policy.adapted()) and all(moved.values())
        batch = random_batch()
        assert not torch.allclose(
            finished.policy.score(batch), finished.policy.score(batch, reference="base"), atol=1e-3
        )


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setitem(rlsafe.types._PROVIDERS, "lenient", SimpleNamespace(judge=lambda spec: Lenient()))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    made: dict[str, World] = {}

    def get(architecture: str, **shape: Any) -> World:
        key = f"{architecture}-{len(shape)}"
        if key not in made:
            made[key] = World(tmp_path_factory.mktemp(key), architecture, **shape)
        return made[key]

    return get


def test_the_covering_set_covers():
    counts = Counter(name for names in COVER.values() for name in names)
    assert set(COVER) == set(SIX) and set(counts) == set(_BUILT_IN) - NEWER and min(counts.values()) >= 2


@pytest.mark.parametrize(
    "architecture",
    [*SIX[:2], *(pytest.param(name, marks=pytest.mark.integration) for name in SIX[2:])],
)
def test_a_mixed_run_under_several_defenses(world, architecture):
    world(architecture).check(*COVER[architecture])


@pytest.mark.slow
@pytest.mark.parametrize("architecture", SIX)
@pytest.mark.parametrize("defense", sorted({name for names in COVER.values() for name in names}))
def test_every_defense_on_every_architecture(world, architecture, defense):
    world(architecture).check(defense)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", SIX)
def test_the_covering_set_with_rollouts_from_vllm(world, architecture):
    pytest.importorskip("vllm")
    from rlsafe.rollouts import close_all

    try:
        sampler = {"kind": "vllm", "max_model_len": 192, "max_num_seqs": 16}
        world(architecture, **wide(architecture)).check(*COVER[architecture], sampler=sampler)
    finally:
        close_all()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", SIX)
def test_full_fine_tuning_on_every_architecture(world, architecture):
    here = world(architecture)
    out = here.directory / "full"
    tree = tree_with(here.tree, {"model": {"lora": None}, "optim": {"lr": 1e-3}, "defenses": ["kl", "ldifs"]})
    finished = run(run_from_tree(tree), out)
    before = load_file(str(here.directory / "model" / "model.safetensors"))
    after = load_file(str(out / "model" / "model.safetensors"))
    assert set(before) == set(after) and all(not torch.equal(before[n], after[n]) for n in before)
    assert all(r["sampler_gap"] < 1e-4 for r in finished.records if r["path"] == "grpo")
