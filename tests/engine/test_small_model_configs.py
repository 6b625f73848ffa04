"""The configs of small real models can be looked at offline, share one model section, and need no judge over a network."""

from pathlib import Path

import pytest

from rlsafe.compare import dry_compare
from rlsafe.config import load_compare, load_run
from rlsafe.engine.plan.timing import Speed
from rlsafe.engine.run import dry

ROOT = Path(__file__).resolve().parents[2]
NAMES = [f"{path}_{domain}" for path in ("sft", "grpo", "mixed") for domain in ("code", "medical")]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)  # reward files are named from where the command runs
    monkeypatch.setattr(dry, "speed_of", lambda dtype, threads: Speed(1e11, 1e10))


@pytest.mark.parametrize("name", NAMES)
def test_every_run_says_what_it_takes(name):
    found = dry.dry(load_run(f"configs/qwen2.5-coder-0.5b/{name}.yaml"))
    assert found.work.judging.calls == 0 and "published dimensions" in found.memory[0]
    assert 60 < sum(found.work.seconds) < 24 * 3600
    assert found.prepared.config.model.lora.r == 16


def test_a_comparisons_paths_see_as_many_completions_with_one_adapter():
    config = load_compare("configs/qwen2.5-coder-0.5b/compare.yaml")
    assert set(config.defenses) == {"none", "kl", "inoculation", "interleaving", "interleaving-onpolicy", "ldifs"}
    assert not any("model" in tree for tree in config.paths.values())
    counts = []
    for path in ("sft", "grpo", "mixed"):
        run = load_run(f"configs/qwen2.5-coder-0.5b/{path}_code.yaml")
        work = dry.dry(run).work
        supervised = sum(part.rows for step in dry.prepare(run).plan for part in step.parts if part.path == "sft")
        counts.append(work.completions + supervised)
    assert max(counts) - min(counts) <= 64 and counts[0] == 1024


def test_the_quick_size_is_small():
    lines = dry_compare("configs/qwen2.5-coder-0.5b/compare.yaml", ["none", "kl", "interleaving"], quick=True)
    assert lines[0] == "7 cells: 1 untrained, 6 narrow"


@pytest.mark.parametrize("name", NAMES)
def test_both_models_share_everything_but_their_name(name):
    one, other = (load_run(f"configs/{model}/{name}.yaml") for model in ("smollm2-135m", "qwen2.5-coder-0.5b"))
    other = other.model_copy(update={"model": other.model.model_copy(update={"name": one.model.name})})
    assert one == other
