"""Full fine-tuning: model/ instead of adapter/, a frozen copy as `base`, resumed and evaluated like any run."""

import json
import signal

import pytest
import torch
from safetensors.torch import load_file
from tiny import write_jsonl
from tiny_architectures import load, random_batch
from tiny_runs import tree_with

from rlsafe.config import UserError, run_from_tree
from rlsafe.engine.run.life import run, train
from rlsafe.evaluate.commands.command import load_policy
from rlsafe.types import Interrupted

FULL = {"model": {"lora": None}, "optim": {"lr": 1e-3}}
MIXED = {
    "schedule": {"steps": 4, "phases": [{"cycle": ["sft", "both"]}],
                 "kinds": {"both": [{"path": "grpo"}, {"path": "sft", "rows": 3, "weight": 0.5}]}},
    "defenses": [{"kl": {"weight": 0.1}}, {"ldifs": {"weight": 0.1}}, {"interleaving": {"fraction": 0.3}}],
}  # fmt: skip


@pytest.fixture
def tree(tiny_tree):
    return tree_with(tiny_tree, FULL, MIXED)


def weights(out):
    return load_file(str(out / "model" / "model.safetensors"))


def test_a_mixed_run_ends_with_a_model_that_loads_alone(tree, tmp_path, tiny_model_dir):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    finished = run(run_from_tree(tree), tmp_path / "run")
    assert not (tmp_path / "run" / "adapter").exists()
    before, after = load_file(f"{tiny_model_dir}/model.safetensors"), weights(tmp_path / "run")
    assert set(before) == set(after) and all(not torch.equal(before[n], after[n]) for n in before)
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "model").chat_template
    ids = random_batch().ids
    with torch.no_grad():
        assert torch.allclose(alone(ids).logits, finished.policy.model.eval()(ids).logits, atol=1e-5)
    records = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    assert {r["path"] for r in records} == {"sft", "grpo"}
    # the frozen copy: no distance at first, some after the first update
    for name in ("kl/full", "ldifs/distance"):
        values = [v for r in records for k, v in r.items() if k == f"defense/{name}"]
        assert abs(values[0]) < 1e-6 < values[-1], (name, values, [k for r in records for k in r if "defense" in k])


def test_interrupted_and_resumed_it_ends_with_the_same_bits(tree, tmp_path):
    run(run_from_tree(tree), tmp_path / "whole")

    def stop(done, *_):
        if done == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        run(run_from_tree(tree), tmp_path / "cut", progress=stop)
    run(run_from_tree(tree), tmp_path / "cut", resume=True)
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[n], cut[n]) for n in whole)


def test_evaluation_finds_the_trained_weights(tree, tmp_path):
    config = run_from_tree(tree)
    finished = run(config, tmp_path / "run")
    policy, path = load_policy(finished.config, tmp_path / "run")
    batch = random_batch()
    assert path == str(tmp_path / "run" / "model")
    assert torch.allclose(policy.score(batch), finished.policy.score(batch), atol=1e-5)
    assert not torch.allclose(policy.score(batch), load(tree["model"]["name"], rank=None).score(batch), atol=1e-2)
    with pytest.raises(UserError, match="has no model/; the run is not finished"):
        load_policy(finished.config, tmp_path)


def test_half_precision_weights_are_a_warning(tiny_model_dir, caplog):
    load(tiny_model_dir, rank=None)
    load(tiny_model_dir, dtype="bfloat16")
    assert not caplog.messages
    load(tiny_model_dir, rank=None, dtype="bfloat16")
    assert "full fine-tuning in bfloat16" in caplog.text


def test_its_model_directory_is_a_reference_for_another_run(tree, tmp_path):
    run(run_from_tree(tree), tmp_path / "run")
    reference = f"path:{tmp_path / 'run' / 'model'}"
    other = tree_with(tree, {"defenses": [{"kl": {"weight": 0.1, "reference": reference}}]})
    run(run_from_tree(other), tmp_path / "other")
    first = json.loads(open(tmp_path / "other" / "metrics.jsonl").readline())
    assert first["defense/kl/full"] > 1e-4  # the policy starts where the other run started, not where it ended


def test_what_needs_an_adapter_says_so(tree, tmp_path, tiny_model_dir):
    for change, says in [
        ({"defenses": [{"safelora": {"base": tiny_model_dir}}]}, "safelora.*LoRA"),
        ({"model": {"adapter": "x"}}, "full fine-tuning .* cannot start from an adapter"),
    ]:
        with pytest.raises(UserError, match=says):
            run(run_from_tree(tree_with(tree, change)), tmp_path / "bad")


def test_overwriting_removes_the_model_of_the_run_before(tree, tmp_path):
    file = write_jsonl(tmp_path / "run.yaml", [tree])  # JSON is YAML
    train(file, out=tmp_path / "run")
    train(file, ["model.lora={r: 2, alpha: 4}"], out=tmp_path / "run", overwrite=True)
    assert (tmp_path / "run" / "adapter").is_dir() and not (tmp_path / "run" / "model").exists()
