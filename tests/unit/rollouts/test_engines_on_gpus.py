# ruff: noqa: F811  (a fixture is taken by its name)
"""What vLLM is asked for on GPUs: how weights reach it, how many engines live, what a lack of memory is called."""

from __future__ import annotations

import sys

import pytest
import torch
from stand_in_vllm import vllm  # noqa: F401
from tiny_architectures import load, nudge

from rlsafe.config import SamplerConfig, UserError
from rlsafe.rollouts import CannotRun, make_sampler
from rlsafe.rollouts.selftest import gap_limit

CONFIG = SamplerConfig(kind="vllm")


@pytest.fixture(scope="module")
def policies(tiny_model_dir):
    """Loaded while there is no GPU yet."""
    few = {"r": 2, "alpha": 4, "targets": ["q_proj", "down_proj"]}
    return {
        "float32": load(tiny_model_dir), "bfloat16": load(tiny_model_dir, dtype="bfloat16"),
        "few": nudge(load(tiny_model_dir, lora=few)),
    }  # fmt: skip


@pytest.fixture
def policy(policies):
    return policies["float32"]


@pytest.mark.parametrize(("dtype", "adapters"), [("bfloat16", True), ("float32", False)])
def test_adapters_go_to_a_gpu_in_half_precision_only(policies, vllm, tiny_model_dir, dtype, adapters):
    policy = policies[dtype]
    make_sampler(CONFIG, tiny_model_dir, policy, 0)
    assert vllm.made[0].settings.get("enable_lora", False) is adapters
    asked = CONFIG.model_copy(update={"sync": "adapter"})
    if adapters:
        make_sampler(asked, tiny_model_dir, policy, 0)
    else:
        with pytest.raises(UserError, match="sampler.sync: adapter: vLLM's kernels on a GPU take bfloat16 or float16"):
            make_sampler(asked, tiny_model_dir, policy, 0)


def test_another_engine_is_closed_before_one_starts(policy, vllm, tiny_model_dir):
    first = make_sampler(CONFIG, tiny_model_dir, policy, 0)
    assert make_sampler(CONFIG, tiny_model_dir, policy, 0) is first and len(vllm.made) == 1
    steered = make_sampler(CONFIG, tiny_model_dir, policy, 0, steerable=True)
    assert [engine.open for engine in vllm.made] == [False, True]
    assert first.closed and not steered.closed and not hasattr(first, "_llm")
    assert not vllm.made[0].settings["enforce_eager"] and vllm.made[1].settings["enforce_eager"]


def test_a_run_whose_engine_was_closed_gets_one_again(policy, vllm, tiny_model_dir):
    from rlsafe.engine.train.sync import SyncedSampler

    made = []

    def make():
        made.append(make_sampler(CONFIG, tiny_model_dir, policy, 0))
        return made[-1]

    owner = SyncedSampler(make, policy, {}, seed=0, test=False)
    first = owner.synced()
    make_sampler(CONFIG, tiny_model_dir, policy, 0, steerable=True)
    assert first.closed
    owner.weights_changed()
    assert owner.synced() is made[1] and not made[1].closed


def test_what_a_half_started_engine_took_is_given_back(policy, vllm, tiny_model_dir, monkeypatch):
    given = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given.append(1))
    vllm.fails = RuntimeError("kernel image is not available")
    with pytest.raises(CannotRun, match="vLLM cannot run .*: kernel image"):
        make_sampler(CONFIG, tiny_model_dir, policy, 0)
    assert given and vllm.fails.__traceback__ is None


@pytest.mark.parametrize(
    "error",
    [
        ValueError("Free memory on device cuda:0 (30/80 GiB) on startup is less than desired GPU memory utilization"),
        ValueError("No available memory for the cache blocks. Try increasing `gpu_memory_utilization`"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    ],
)
def test_too_little_memory_names_the_setting_and_what_is_free(policy, vllm, tiny_model_dir, error):
    vllm.fails = error
    with pytest.raises(UserError, match=r"sampler.gpu_memory: 0.4 .*\(60.0 of 80.0 GiB are\)") as raised:
        make_sampler(CONFIG.model_copy(update={"kind": "auto"}), tiny_model_dir, policy, 0)
    assert "sampler.kind" not in str(raised.value)


def test_merged_weights_are_made_while_they_are_loaded(policies, vllm, tiny_model_dir, monkeypatch):
    """No more than one tensor of the policy's exists at a time, whole units come together, the rest from the checkpoint."""
    policy = policies["few"]
    made, taken = [], []
    weights = policy.merged_weights
    monkeypatch.setattr(
        policy, "merged_weights", lambda: (made.append(name) or (name, tensor) for name, tensor in weights())
    )

    def rpc(self, name, kwargs=None):
        for key, _ in kwargs["weights_iterator"] if name == "reload_weights" else ():
            taken.append(key)
            assert len(made) <= sum(name in taken for name in made) + 1

    monkeypatch.setattr(vllm, "collective_rpc", rpc)
    make_sampler(CONFIG, tiny_model_dir, policy, 0)
    units = [name.rsplit(".", 2)[0] for name in taken]
    assert len(made) == 4 and set(made) < set(taken) and len(taken) == len(set(taken))
    assert [unit for i, unit in enumerate(units) if i == 0 or units[i - 1] != unit] == list(dict.fromkeys(units))


def test_float32_on_a_gpu_is_given_what_tf32_explains(tiny_model_dir):
    policy = load(tiny_model_dir)
    assert gap_limit(policy, None) == 1e-3 and gap_limit(policy, 0.2) == 0.2
    policy._device = torch.device("cuda")
    assert gap_limit(policy, None) == 1e-2


def test_half_precision_and_an_8_bit_base_have_limits_of_their_own(policies, tiny_model_dir):
    assert gap_limit(policies["bfloat16"], None) == 0.1
    packed = {bits: load(tiny_model_dir, dtype="bfloat16", quantization=bits) for bits in ("4bit", "8bit")}
    assert gap_limit(packed["4bit"], None) == 0.1 and gap_limit(packed["8bit"], None) == 0.3


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_an_adapter_is_never_added_to_an_unquantised_base_on_a_server(tiny_model_dir, monkeypatch, bits):
    from rlsafe import rollouts

    class Connects(Exception):
        """Where the test ends: there is no server."""

    asked = []

    def connect(urls, **settings):
        asked.append(settings["sync"])
        raise Connects

    monkeypatch.setattr(rollouts, "_ENGINES", {})
    monkeypatch.setattr(rollouts, "ServerSampler", connect)
    policy = load(tiny_model_dir, dtype="bfloat16", quantization=bits)
    server = SamplerConfig(kind="server", urls=["http://localhost:1"])
    with pytest.raises(Connects):
        make_sampler(server, tiny_model_dir, policy, 0)
    assert asked == ["merged"]
    with pytest.raises(UserError, match="sampler.sync: adapter would be added to an unquantised base"):
        make_sampler(server.model_copy(update={"sync": "adapter"}), tiny_model_dir, policy, 0)


@pytest.mark.parametrize("room", [True, False])
def test_an_adapter_goes_through_memory_as_small_as_vllm_reads_it(
    policies, vllm, tiny_model_dir, monkeypatch, tmp_path, room
):
    from safetensors.torch import load_file

    from rlsafe.rollouts import vllm as colocated

    monkeypatch.setattr(colocated, "SHARED_MEMORY", str(tmp_path if room else tmp_path / "absent"))
    seen = []
    monkeypatch.setattr(
        sys.modules["vllm.lora.request"], "LoRARequest",
        lambda name, number, path: seen.append((path, load_file(f"{path}/adapter_model.safetensors"))) or number,
    )  # fmt: skip
    policy = policies["bfloat16"]
    make_sampler(CONFIG, tiny_model_dir, policy, 0)
    [(path, tensors)] = seen
    assert path.startswith(str(tmp_path)) is room
    own = {name.replace(".default", ""): parameter for name, parameter in policy.trainable().items()}
    assert tensors.keys() == own.keys()
    assert all(torch.equal(tensors[name], own[name].detach().bfloat16()) for name in own)
