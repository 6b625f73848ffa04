"""The dry run's memory estimate against what PyTorch really allocates and keeps."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from places import ROOT, SUPPORT
from tiny_architectures import ARCHITECTURES, load, random_batch, save_architecture

from rlsafe.config import LoraConfig, ModelConfig, OptimConfig, RunConfig
from rlsafe.engine.plan.estimate import activations, describe_memory, memory
from rlsafe.engine.train.optimizer import make_optimizer
from rlsafe.policy import ForwardPlan
from rlsafe.policy.shapes import model_shape


def shape_of(directory, **settings):
    config = ModelConfig(name=directory, **({"lora": LoraConfig(r=4, alpha=8)} | settings))
    found = model_shape(config, directory)
    assert found is not None
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_parameters_are_counted_exactly_without_loading_them(architecture, tmp_path):
    directory = save_architecture(tmp_path, architecture)
    shape, policy = shape_of(directory), load(directory)
    trained = sum(p.numel() for p in policy.trainable().values())
    assert shape.adapter == trained
    assert shape.parameters == sum(p.numel() for p in policy.core.parameters()) - trained
    assert shape.linear == sum(layer.get_base_layer().weight.numel() for layer in policy.adapted().values())


@pytest.mark.parametrize(
    "name, parameters, lora",
    [  # as the models' pages give them; the adapter of Qwen2.5-7B as PEFT counts it
        ("Qwen/Qwen2.5-0.5B-Instruct", 494_032_768, 17_596_416),
        ("Qwen/Qwen2.5-7B", 7_615_616_512, 80_740_352),
        ("unsloth/Qwen2.5-32B-Instruct", 32_763_876_352, 268_435_456),
        ("Qwen/Qwen3-14B", 14_768_307_200, 128_450_560),
        ("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248, 83_886_080),
    ],
)
def test_published_models_are_known_without_their_files(name, parameters, lora):
    shape = model_shape(ModelConfig(name=name), name)
    assert (shape.parameters, shape.adapter, shape.source) == (parameters, lora, "published dimensions")


def test_an_unknown_model_has_no_shape():
    for name in ("some/model", "Qwen/Qwen2.5-7.5B", "nothing"):
        assert model_shape(ModelConfig(name=name), name) is None


WIDE = {
    "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 512,
}  # fmt: skip


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """{architecture: directory} of models large enough for their blocks to outweigh everything else."""
    from tiny import byte_tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM

    directories = {}
    for kind in ("qwen2", "qwen3", "llama"):
        directory = str(tmp_path_factory.mktemp(kind))
        tokenizer = byte_tokenizer()
        ids = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": None}
        AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **WIDE, **ids)).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        directories[kind] = directory
    return directories


def kept_by_autograd(policy, batch) -> int:
    """Bytes of every distinct storage that the forward saves for the backward, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in policy.core.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = policy.forward(batch, ForwardPlan.from_needs(set()), {})
    assert out.logp.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rank", [8, None])
def test_activations_are_what_autograd_keeps(architecture, dtype, rank, wide):
    """Within 10%; with checkpointing what is kept is one block's input each (the block that is recomputed comes on top)."""
    directory = wide[architecture]
    shape = shape_of(directory, lora=LoraConfig(r=8) if rank else None)
    batch = random_batch(rows=4, width=256)
    size, tokens = (4 if dtype == "float32" else 2), batch.ids.numel()
    for recompute in (False, True):
        policy = load(directory, rank=rank, dtype=dtype, gradient_checkpointing=recompute)
        real = kept_by_autograd(policy, batch)
        estimate = activations(shape, tokens, size, lora=rank is not None, recompute=recompute)
        if recompute:
            estimate -= activations(shape, tokens, size, lora=rank is not None, recompute=False) // shape.layers
            assert 0.5 * real < estimate <= real  # the rest: the embeddings, the final norm, the head's states
        else:
            assert estimate == pytest.approx(real, rel=0.1)


def run_config(directory, **settings):
    tree = {
        "model": {"name": directory, "dtype": "float32", "lora": {"r": 8}},
        "data": {"narrow": {"source": "x.jsonl"}},
    }
    return RunConfig.model_validate(tree | settings)


def test_adapter_gradients_and_moments_are_exact(wide):
    shape, policy = shape_of(wide["qwen2"], lora=LoraConfig(r=8)), load(wide["qwen2"], rank=8)
    need = memory(run_config(wide["qwen2"]), shape, cuda=False)
    parameters = list(policy.trainable().values())
    optimizer = make_optimizer(OptimConfig(), parameters, print)
    policy.forward(random_batch(), ForwardPlan.from_needs(set()), {}).logp.sum().backward()
    optimizer.step()
    assert need.adapter == sum(p.numel() * p.element_size() for p in parameters)
    assert need.gradients == sum(p.grad.numel() * p.grad.element_size() for p in parameters)
    moments = [t for state in optimizer.state.values() for name, t in state.items() if name != "step"]
    assert need.optimizer == sum(t.numel() * t.element_size() for t in moments)


def test_eight_bit_moments_take_a_quarter_and_fall_back_with_one_clear_line(wide, monkeypatch):
    from rlsafe.engine.plan import estimate

    config = run_config(wide["qwen2"], optim={"kind": "adamw_8bit"})
    shape = shape_of(wide["qwen2"])
    eight = memory(config, shape, cuda=False).optimizer
    monkeypatch.setattr(estimate, "find_spec", lambda name: None)
    assert memory(config, shape, cuda=False).optimizer == 4 * eight == 4 * memory(config, shape, cuda=True).optimizer
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    told = []
    optimizer = make_optimizer(
        OptimConfig(kind="adamw_8bit"), list(load(wide["qwen2"]).trainable().values()), told.append
    )
    assert type(optimizer) is torch.optim.AdamW
    [line] = told
    assert line.startswith("optim.kind: adamw_8bit needs bitsandbytes (pip install bitsandbytes); this run uses adamw")


MEASURE = """
import sys
from tiny_architectures import load, random_batch
from rlsafe.policy import ForwardPlan
from rlsafe.engine.train.optimizer import make_optimizer
from rlsafe.config import OptimConfig
def step(directory, batch):
    policy = load(directory, rank=8, gradient_checkpointing=sys.argv[3] == "True")
    optimizer = make_optimizer(OptimConfig(), list(policy.trainable().values()), print)
    policy.forward(batch, ForwardPlan.from_needs(set()), {}).logp.sum().backward()
    optimizer.step()
step(sys.argv[2], random_batch())  # imports everything
def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts again from here
before = status("VmRSS")
step(sys.argv[1], random_batch(rows=8, width=512))
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux says how much memory a process took")
@pytest.mark.integration  # each in a process of its own
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_estimate_is_the_memory_of_a_process_within_a_factor_of_one_and_a_half(checkpointing, wide, tiny_model_dir):
    model = {"name": wide["qwen2"], "dtype": "float32", "lora": {"r": 8}, "gradient_checkpointing": checkpointing}
    config = run_config(wide["qwen2"], model=model)
    need = memory(
        config, shape_of(wide["qwen2"], lora=LoraConfig(r=8)), cuda=False, longest={"narrow": (8 * 512 // 16, 0)}
    )
    assert need.tokens == 8 * 512
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, wide["qwen2"], tiny_model_dir, str(checkpointing)],
        capture_output=True, text=True, cwd=SUPPORT, check=True,
        # glibc keeps what was freed: with tensors in mappings of their own, resident memory is live memory
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
    )  # fmt: skip
    real = int(done.stdout.strip().splitlines()[-1])
    assert real / 1.5 < need.training < real * 1.5, (need, real)


def test_the_words_say_what_fits(wide):
    shape = model_shape(ModelConfig(name="Qwen/Qwen2.5-7B"), "Qwen/Qwen2.5-7B")
    config = RunConfig(model=ModelConfig(name="Qwen/Qwen2.5-7B", gradient_checkpointing=True))
    text = "\n".join(describe_memory(config, shape, memory(config, shape, cuda=True), True))
    assert "fits one GPU of 40 GiB (sampler.gpu_memory 0.4)" in text and "with gradient checkpointing" in text
    plain = RunConfig(model=ModelConfig(name="Qwen/Qwen2.5-7B", lora=LoraConfig(fused=False)))
    text = "\n".join(describe_memory(plain, shape, memory(plain, shape, cuda=True), True))
    assert "does not fit one GPU of 192 GiB: sampler.kind=server" in text and "without gradient checkpointing" in text


@pytest.mark.slow
def test_the_planning_tables_estimates_stand_beside_what_real_runs_take():
    """SFT and GRPO runs of 1 M, 5 M and 50 M parameters, each with the estimate within a factor of one and a half."""
    done = subprocess.run(["bash", ROOT / "scripts" / "plan", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    table = done.stdout[done.stdout.index("estimate / measured") :].splitlines()[2:]
    points = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert len(points) == 6 and {path for _, path, *_ in points} == {"sft", "grpo"}
    assert all(1 / 1.5 < float(ratio) < 1.5 for *_, ratio in points), done.stdout
