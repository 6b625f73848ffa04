"""Frozen references: which weights each name means, and that taking or using one disturbs nothing."""

import pytest
import torch
from tiny_architectures import load, nudge, random_batch

from rlsafe.config import UserError
from rlsafe.policy import ForwardPlan


def scores(policy, reference=None):
    return policy.score(random_batch(), reference=reference)


def test_base_start_and_snapshots_are_different_things(tiny_model_dir, tmp_path):
    """Trap 4: after a warm-up, "the reference" is ambiguous; here every one has a name."""
    first = nudge(load(tiny_model_dir))
    first.save_adapter(tmp_path / "adapter")
    policy = load(tiny_model_dir, adapter=str(tmp_path / "adapter"))
    at_start = scores(policy)
    assert torch.allclose(at_start, scores(first), atol=1e-6)
    nudge(policy, seed=1)
    warmed = scores(policy)
    policy.snapshot("grpo_start")
    nudge(policy, seed=2)
    now = scores(policy)
    plain = scores(load(tiny_model_dir))
    assert torch.allclose(scores(policy, "start"), at_start, atol=1e-6)
    assert torch.equal(scores(policy, "grpo_start"), warmed)
    assert torch.allclose(scores(policy, "base"), plain, atol=1e-6)
    assert torch.equal(scores(policy), now)
    assert not torch.allclose(now, warmed, atol=1e-2) and not torch.allclose(plain, at_start, atol=1e-2)
    assert sorted(policy.reference_state()) == ["grpo_start", "start"]  # the base is loaded with the model


def test_start_is_the_base_for_a_fresh_adapter(tiny_model_dir):
    policy = nudge(load(tiny_model_dir))
    assert torch.equal(scores(policy, "start"), scores(policy, "base"))


def test_a_frozen_forward_leaves_the_policy_bitwise_alone(tiny_model_dir):
    policy = nudge(load(tiny_model_dir))
    policy.snapshot("step:3")
    nudge(policy, seed=5)
    before = policy.state_dict()
    whole = {name: p.clone() for name, p in policy.core.named_parameters()}
    batch = random_batch()
    plan = ForwardPlan(references=("base", "step:3"), layers=(1,), layer_references=("step:3",))
    for _ in range(3):
        out = policy.forward(batch, plan, policy.frozen(batch, plan))
    (out.kl["base"] + out.kl["step:3"]).sum().backward()
    assert all(torch.equal(before[name], p) for name, p in policy.state_dict().items())
    assert all(torch.equal(whole[name], p) for name, p in policy.core.named_parameters())
    assert all(p.requires_grad for p in policy.trainable().values())


def test_an_error_inside_a_reference_restores_the_policy(tiny_model_dir):
    policy = nudge(load(tiny_model_dir))
    policy.snapshot("a")
    nudge(policy)
    before = scores(policy)
    for name in ("base", "a"):
        with pytest.raises(RuntimeError, match="inside"), policy._references.active(name):
            raise RuntimeError("inside")
    assert torch.equal(scores(policy), before)


def test_full_fine_tuning_keeps_a_frozen_copy_and_its_own_head(tiny_model_dir):
    policy = load(tiny_model_dir, rank=None)
    plain = scores(policy)
    nudge(policy, 0.02)
    assert torch.allclose(scores(policy, "base"), plain, atol=1e-6)
    assert torch.allclose(scores(policy, "start"), plain, atol=1e-6)
    batch = random_batch()
    plan = ForwardPlan(references=("base",))
    kl = policy.forward(batch, plan, policy.frozen(batch, plan)).kl["base"]
    with torch.no_grad():
        p = policy.core.model(batch.ids).logits.double().log_softmax(-1)
        with policy._references.active("base"):
            q = policy.core.model(batch.ids).logits.double().log_softmax(-1)
    exact = (p.exp() * (p - q)).sum(-1)[:, :-1] * batch.loss_mask[:, 1:]
    assert torch.allclose(kl[:, 1:].double(), exact, atol=1e-5)


@pytest.mark.parametrize(("rank", "alpha", "targets"), [(4, 8, "all-linear"), (2, 5, ["q_proj", "down_proj"])])
def test_a_saved_adapter_is_a_reference_whatever_its_rank_and_scale(tiny_model_dir, tmp_path, rank, alpha, targets):
    other = nudge(load(tiny_model_dir, lora={"r": rank, "alpha": alpha, "targets": targets, "rslora": rank == 4}))
    other.save_adapter(tmp_path / "other")
    policy = nudge(load(tiny_model_dir), seed=9)
    reference = f"path:{tmp_path / 'other'}"
    policy.check_reference(reference)
    assert torch.allclose(scores(policy, reference), scores(other), atol=1e-5)


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("read_before", [False, True])
def test_sharded_weights_take_an_adapter_of_lower_rank_as_it_is(tiny_model_dir, tmp_path, one_process, read_before):
    other = nudge(load(tiny_model_dir, lora={"r": 2, "alpha": 5, "targets": ["q_proj", "down_proj"], "rslora": False}))
    other.save_adapter(tmp_path / "other")
    policy = nudge(load(tiny_model_dir), seed=9)
    reference = f"path:{tmp_path / 'other'}"
    if read_before:
        policy.check_reference(reference)
    policy.shard(torch.device("cpu"))
    before = scores(policy)
    assert torch.allclose(scores(policy, reference), scores(other), atol=1e-5)
    assert torch.equal(scores(policy), before)


def test_a_slice_of_an_adapter_of_lower_rank_is_cut_from_the_right_shape(tiny_model_dir, tmp_path, monkeypatch):
    """ZeRO-3 cuts flat slices: of another shape they would be put together as other matrices."""
    from rlsafe.policy import references

    nudge(load(tiny_model_dir, lora={"r": 2, "alpha": 8})).save_adapter(tmp_path / "other")
    policy = load(tiny_model_dir)
    shapes = {name: p.shape for name, p in policy.trainable().items()}
    for parameter in policy.trainable().values():
        parameter.ds_shape = parameter.shape  # as DeepSpeed notes it
    monkeypatch.setattr(references, "is_cut", lambda tensor: hasattr(tensor, "ds_shape"))
    read = policy._references.tensors(f"path:{tmp_path / 'other'}")
    assert {name: tensor.shape for name, tensor in read.items()} == shapes
    assert all(not tensor[:, 2:].any() and tensor[:, :2].any() for name, tensor in read.items() if "lora_B" in name)


def test_sharded_weights_have_no_room_for_an_adapter_of_higher_rank(tiny_model_dir, tmp_path, one_process):
    nudge(load(tiny_model_dir, lora={"r": 8, "alpha": 8})).save_adapter(tmp_path / "other")
    policy = load(tiny_model_dir)
    policy.shard(torch.device("cpu"))
    with pytest.raises(UserError, match="path:.*rank 8, .* only, 4; set model.lora.r=8, or .*ddp.yaml"):
        policy.check_reference(f"path:{tmp_path / 'other'}")


def test_a_saved_full_model_is_a_reference(tiny_model_dir, tmp_path):
    other = nudge(load(tiny_model_dir, rank=None), 0.02)
    other.save_adapter(tmp_path / "other")
    policy = load(tiny_model_dir, rank=None)
    assert torch.allclose(scores(policy, f"path:{tmp_path / 'other'}"), scores(other), atol=1e-5)


def test_snapshots_survive_a_checkpoint(tiny_model_dir):
    policy = nudge(load(tiny_model_dir))
    policy.snapshot("grpo_start")
    nudge(policy, seed=1)
    later = load(tiny_model_dir)
    later.load_state_dict(policy.state_dict())
    later.load_reference_state(policy.reference_state())
    assert torch.equal(scores(later), scores(policy))
    assert torch.equal(scores(later, "grpo_start"), scores(policy, "grpo_start"))
    assert later.has_reference("grpo_start") and not later.has_reference("step:1")


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("grpo_strat", "did you mean 'grpo_start'"),
        ("path:nowhere", "no such directory"),
        ("path:{tmp}", "adapter_config.json"),
    ],
)
def test_a_wrong_reference_is_one_clear_line(tiny_model_dir, tmp_path, reference, says):
    policy = load(tiny_model_dir)
    policy.snapshot("grpo_start")
    with pytest.raises(UserError, match=says):
        policy.check_reference(reference.format(tmp=tmp_path))


def test_an_adapter_that_covers_more_than_the_policy_is_refused(tiny_model_dir, tmp_path):
    nudge(load(tiny_model_dir)).save_adapter(tmp_path / "wide")
    policy = load(tiny_model_dir, lora={"r": 4, "alpha": 8, "targets": ["q_proj"]})
    with pytest.raises(UserError, match="does not cover"):
        policy.check_reference(f"path:{tmp_path / 'wide'}")
