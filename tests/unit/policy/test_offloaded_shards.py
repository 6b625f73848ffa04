"""Shards that rest in host memory are computed with on the GPU."""

import torch
from tiny_architectures import load

from rlsafe.policy import sharding


def test_batches_go_where_shards_are_gathered_not_where_they_rest(tiny_model_dir, monkeypatch):
    monkeypatch.setattr(sharding, "shard_module", lambda *arguments: None)  # offloaded: parameters stay on the CPU
    policy = load(tiny_model_dir)
    assert policy.device == torch.device("cpu")
    policy.shard(torch.device("meta"), offload=True)
    assert policy.core.output.weight.device.type == "cpu" and policy.device.type == "meta"
