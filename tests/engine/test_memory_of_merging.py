"""The estimate counts the tensors that are made for vLLM: a unit at a time, and only where merged weights are sent."""

import pytest

from rlsafe.config import run_from_tree
from rlsafe.engine.plan.estimate import memory
from rlsafe.policy.shapes import model_shape


@pytest.mark.parametrize(
    ("model", "sampler", "merges"),
    [
        ({"dtype": "bfloat16"}, {"kind": "auto"}, False),
        ({"dtype": "float32"}, {"kind": "auto"}, True),
        ({"dtype": "bfloat16", "quantization": "4bit"}, {"kind": "vllm"}, True),
        ({"dtype": "bfloat16"}, {"kind": "vllm", "sync": "merged"}, True),
        ({"dtype": "bfloat16", "quantization": "4bit"}, {"kind": "transformers"}, False),
    ],
)
def test_what_merging_takes(tiny_tree, model, sampler, merges):
    name = "Qwen/Qwen2.5-32B"
    config = run_from_tree(tiny_tree | {"model": {"name": name, "lora": {"r": 4}, **model}, "sampler": sampler})
    need = memory(config, model_shape(config.model, name), cuda=True)
    assert (need.merging > 0) is merges and need.merging < 8 << 30
    assert need.training >= need.merging


def test_an_adapter_that_is_still_to_be_written_counts_as_one_of_its_settings(tiny_tree):
    """Arms of a comparison start from its warm-up, which a dry run has not trained."""
    shapes = [
        model_shape(
            run_from_tree(tiny_tree | {"model": {**tiny_tree["model"], **start}}).model, tiny_tree["model"]["name"]
        )
        for start in ({}, {"adapter": "warmup:0123"})
    ]
    assert shapes[0] == shapes[1] and 0 < shapes[1].adapter < shapes[1].parameters
