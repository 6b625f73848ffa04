# ruff: noqa: F811  (a fixture is taken by its name)
"""Full weights for a server: by TRL's client, whole units at a time, and one line for a server that takes none."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from stand_in_vllm import vllm  # noqa: F401
from tiny_architectures import load, nudge

from rlsafe.config import SamplerConfig, UserError
from rlsafe.rollouts import make_sampler
from rlsafe.rollouts.remote import Server
from rlsafe.rollouts.units import unit_of

CONFIG = SamplerConfig(kind="server", sync="merged", urls=["http://localhost:1"])


class Client:
    """Stands in for TRL's: what it was asked, in order."""

    calls: list = []
    fails: Exception | None = None

    def __init__(self, base_url, group_port):
        Client.calls.append(("made", base_url, group_port))

    def init_communicator(self, device):
        if Client.fails:
            raise Client.fails
        Client.calls.append(("joined", device))

    @contextmanager
    def weight_update(self):
        Client.calls.append(("begun",))
        yield
        Client.calls.append(("ended",))

    def update_named_param(self, name, tensor):
        Client.calls.append(("sent", name, tensor))

    def reset_prefix_cache(self):
        Client.calls.append(("cleared",))


@pytest.fixture(scope="module")
def policy(tiny_model_dir):
    return nudge(load(tiny_model_dir, lora={"r": 2, "alpha": 4, "targets": ["q_proj", "down_proj"]}))


@pytest.fixture
def client(monkeypatch, vllm):
    module = ModuleType("trl.generation.vllm_client")
    module.VLLMClient = Client
    monkeypatch.setitem(sys.modules, "trl.generation.vllm_client", module)
    monkeypatch.setattr(Client, "calls", [])
    monkeypatch.setattr(Client, "fails", None)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)

    def connect(self):
        self.model, self.max_model_len = "model", 64

    monkeypatch.setattr(Server, "connect", connect)
    return Client


def test_a_tensor_that_vllm_fuses_is_sent_with_its_neighbours(policy, client, tiny_model_dir):
    """vLLM keeps q, k and v as one: an update with q alone would fill k and v with whatever the memory held."""
    make_sampler(CONFIG, tiny_model_dir, policy, 0)
    kinds = [call[0] for call in client.calls]
    assert kinds[:3] == ["made", "joined", "begun"] and kinds[-2:] == ["ended", "cleared"]
    sent = {name: tensor for _, name, tensor in (call for call in client.calls if call[0] == "sent")}
    merged = dict(policy.merged_weights())
    files = load_file(f"{tiny_model_dir}/model.safetensors")
    units = {unit_of(name) for name in merged}
    assert set(sent) == {name for name in files if unit_of(name) in units} > set(merged)
    for name, tensor in sent.items():
        assert torch.equal(tensor, merged.get(name, files[name])), name


def test_a_server_that_takes_none_is_one_line_with_how_to_start_it(policy, client, tiny_model_dir):
    client.fails = RuntimeError(
        "The vLLM server at http://localhost:1 has no weight-transfer engine. Restart it with X"
    )
    with pytest.raises(UserError, match="takes no full weights: .*no weight-transfer engine.*--weight-transfer-config"):
        make_sampler(CONFIG, tiny_model_dir, policy, 0)
