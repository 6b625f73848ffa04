"""SafeLoRA: the projection that it says, of the modules that it should, without forming C, and nothing else touched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny_model
from tiny_architectures import load, nudge, save_architecture
from tiny_runs import GRPO, SFT, adapter, distance, train, tree_with

from rlsafe.config import UserError, run_from_tree
from rlsafe.defenses import DefenseStack
from rlsafe.defenses.safelora import SafeLoRA, directions
from rlsafe.engine.run.life import run

PATHS = pytest.mark.parametrize("path", [SFT, GRPO], ids=["sft", "grpo"])


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    """The checkpoint before alignment: another random model of the same shape."""
    return save_tiny_model(tmp_path_factory.mktemp("base"), seed=9)


def changed(tmp_path: Path, source: str, change) -> str:
    """A copy of a checkpoint after `change(tensors)`."""
    shutil.copytree(source, tmp_path / "changed")
    tensors = load_file(tmp_path / "changed" / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "changed" / "model.safetensors", metadata={"format": "pt"})
    return str(tmp_path / "changed")


def set_up(policy, **settings):
    defense, notes = SafeLoRA(**settings), []
    defense.setup(SimpleNamespace(policy=policy, log=notes.append))
    return defense, notes


def dense(v, published=True, rank=None, energy=None):
    """C [out, out] in float64, by its definition."""
    v = v.double()
    if published:
        return v @ v.T / (v * v).sum().sqrt()
    values, vectors = torch.linalg.eigh(v @ v.T)
    values, vectors = values.flip(0), vectors.flip(1)
    if rank is None:
        rank = next(k for k in range(1, len(values) + 1) if values[:k].sum() >= energy * values.sum() * (1 - 1e-9))
    return vectors[:, :rank] @ vectors[:, :rank].T


def by_hand(policy, aligned, base, **how):
    """{module: (cosine, C B)} of every adapted module in float64, from W, B, A and a dense C."""
    out = {}
    for name, layer in policy.adapted().items():
        c = dense(aligned[f"{name}.weight"].double() - base[f"{name}.weight"].double(), **how)
        a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
        update = layer.scaling["default"] * b @ a
        projected = c @ update
        out[name] = (float((update * projected).sum() / update.norm() / projected.norm()), c @ b)
    return out


HOW = {
    "published": ({}, {}),
    "rank": ({"projection": "orthogonal", "rank": 7}, {"published": False, "rank": 7}),
    "energy": ({"projection": "orthogonal", "energy": 0.5}, {"published": False, "energy": 0.5}),
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("select", [{"threshold": 1.0}, {"lowest": 4}, {"threshold": None}], ids=str)
def test_it_agrees_with_a_float64_derivation_that_forms_c(tiny_model_dir, base_dir, how, select):
    settings, definition = HOW[how]
    policy = nudge(load(tiny_model_dir))
    aligned, base = (load_file(f"{d}/model.safetensors") for d in (tiny_model_dir, base_dir))
    with torch.no_grad():
        expected = by_hand(policy, aligned, base, **definition)
    if select == {"threshold": None}:  # between two cosines, so that some modules are left alone
        ordered = sorted(c for c, _ in expected.values())
        select = {"threshold": (ordered[5] + ordered[6]) / 2}
    before = {name: layer.lora_B["default"].weight.clone() for name, layer in policy.adapted().items()}
    identities = {name: id(p) for name, p in policy.trainable().items()}
    defense, _ = set_up(policy, base=base_dir, **select, **settings)
    with torch.no_grad():
        assert defense.weights(policy, "end")
    order = sorted(expected, key=lambda name: expected[name][0])
    chosen = order[:4] if "lowest" in select else [n for n in order if expected[n][0] < select["threshold"]]
    assert len(chosen) == (4 if "lowest" in select else 6 if select["threshold"] < 1 else 14)
    for name, layer in policy.adapted().items():
        assert defense.cosines[name] == pytest.approx(expected[name][0], abs=1e-5)
        now = layer.lora_B["default"].weight
        if name in chosen:
            assert torch.allclose(now.double(), expected[name][1], rtol=1e-3, atol=1e-5)
        else:
            assert torch.equal(now, before[name])
    assert set(defense.projected) == set(chosen)
    assert identities == {name: id(p) for name, p in policy.trainable().items()}
    assert defense.effect()["projected"] == len(chosen) and defense.effect() == {}


def test_a_given_aligned_checkpoint_takes_the_place_of_the_model(tiny_model_dir, base_dir, tmp_path):
    other = save_tiny_model(tmp_path / "other", seed=4)
    policy = nudge(load(tiny_model_dir))
    aligned, base = (load_file(f"{d}/model.safetensors") for d in (other, base_dir))
    with torch.no_grad():
        expected = by_hand(policy, aligned, base)
    defense, _ = set_up(policy, base=base_dir, aligned=other)
    with torch.no_grad():
        defense.weights(policy, "end")
    assert defense.cosines == pytest.approx({name: c for name, (c, _) in expected.items()}, abs=1e-5)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_the_rounding_of_a_quantised_base_is_no_alignment(tmp_path, bits):
    """The aligned weights are those that the base was quantised from: rounding is larger than what alignment changes."""
    wide = {"hidden_size": 128, "intermediate_size": 128}
    aligned_dir = save_architecture(tmp_path / "aligned", "qwen2", **wide)
    aligned = load_file(f"{aligned_dir}/model.safetensors")

    def before_alignment(tensors):
        generator = torch.Generator().manual_seed(1)
        for tensor in tensors.values():
            if tensor.dim() == 2:
                tensor += torch.randn(tensor.shape, generator=generator) * tensor.std() * 0.02

    base_dir = changed(tmp_path, aligned_dir, before_alignment)
    base = load_file(f"{base_dir}/model.safetensors")
    policy = nudge(load(aligned_dir, quantization=bits, dtype="bfloat16"))
    with torch.no_grad():
        expected = by_hand(policy, aligned, base)
        defense, _ = set_up(policy, base=base_dir, threshold=1.0)
        assert defense.weights(policy, "end")
    assert defense.cosines == pytest.approx({name: c for name, (c, _) in expected.items()}, abs=1e-3)


def test_weights_that_need_scales_are_refused(tiny_model_dir, base_dir, tmp_path):
    """They may have the right shape, as in 8 bits, and would be read as other numbers."""
    name = "model.layers.0.self_attn.q_proj"

    def change(tensors):
        tensors[f"{name}.weight"] = (tensors[f"{name}.weight"] * 100).to(torch.int8)

    with pytest.raises(UserError, match=rf"changed stores {name} quantised \(int8\); expected unquantised"):
        set_up(load(tiny_model_dir), base=changed(tmp_path, base_dir, change))


def test_very_wide_matrices_get_their_first_directions_at_random_repeatably(monkeypatch):
    monkeypatch.setattr("rlsafe.defenses.safelora.RANDOMISED", 100)
    generator = torch.Generator().manual_seed(0)
    spectrum = 0.8 ** torch.arange(80.0)
    v = torch.linalg.qr(torch.randn(200, 80, generator=generator))[0] * spectrum
    v = v @ torch.linalg.qr(torch.randn(80, 80, generator=generator))[0]
    state = torch.get_rng_state()
    left = directions(v, 6, None)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert torch.equal(left, directions(v, 6, None)) and left.shape == (200, 6)
    exact = dense(v, published=False, rank=6)
    assert torch.allclose((left @ left.T).double(), exact, atol=1e-4)


def test_unmatched_and_equal_modules_are_left_alone_with_a_word_and_biases_do_no_harm(
    tiny_model_dir, base_dir, tmp_path
):
    """Trap 15: Qwen2 has biases; modules are paired by name."""
    aligned = load_file(f"{tiny_model_dir}/model.safetensors")
    gone, equal = "model.layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj"
    assert f"{gone}.bias" in aligned

    def change(tensors):
        del tensors[f"{gone}.weight"]
        tensors[f"{equal}.weight"] = aligned[f"{equal}.weight"].clone()

    policy = nudge(load(tiny_model_dir))
    before = {name: layer.lora_B["default"].weight.clone() for name, layer in policy.adapted().items()}
    defense, notes = set_up(policy, base=changed(tmp_path, base_dir, change), threshold=1.0)
    with torch.no_grad():
        defense.weights(policy, "end")
    assert len(notes) == 2 and f"{gone} is not in both" in notes[0] and f"equal at {equal}" in notes[1]
    untouched = {n for n, layer in policy.adapted().items() if torch.equal(layer.lora_B["default"].weight, before[n])}
    assert untouched == {gone, equal} and len(defense.cosines) == 12


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"base": "/nowhere/at-all"}, "neither a directory nor a model"),
        ({"projection": "orthogonal"}, "takes either rank or energy"),
        ({"projection": "orthogonal", "rank": 2, "energy": 0.5}, "takes either rank or energy"),
        ({"rank": 2}, "belong to projection: orthogonal"),
    ],
)
def test_settings_that_make_no_sense_are_one_line(tiny_model_dir, base_dir, settings, says):
    with pytest.raises(UserError, match=says):
        set_up(load(tiny_model_dir), **{"base": base_dir, **settings})


def test_checkpoints_that_do_not_fit_are_one_line(tiny_model_dir, base_dir, tmp_path):
    with pytest.raises(UserError, match="differ in no adapted module"):
        set_up(load(tiny_model_dir), base=tiny_model_dir)
    wide = save_tiny_model(tmp_path / "wide", intermediate_size=128)
    with pytest.raises(UserError, match=r"mlp.gate_proj has shape \[128, 64\], expected \[96, 64\]"):
        set_up(load(tiny_model_dir), base=wide)
    name = "model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(UserError, match="NaN or infinite values at model.layers.0.self_attn.q_proj"):
        set_up(load(tiny_model_dir), base=changed(tmp_path, base_dir, lambda t: t[name].fill_(float("nan"))))
    with pytest.raises(UserError, match="set model.lora"):
        set_up(load(tiny_model_dir, rank=None), base=base_dir)
    (tmp_path / "changed" / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(UserError, match="model.safetensors is not readable"):
        set_up(load(tiny_model_dir), base=str(tmp_path / "changed"))
    (tmp_path / "changed" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no .safetensors"):
        set_up(load(tiny_model_dir), base=str(tmp_path / "changed"))


# ------------------------------------------------------------------------------------------------ in runs


@PATHS
def test_at_the_end_it_projects_what_training_without_it_gives(tiny_tree, tmp_path, path, base_dir):
    none = train(tree_with(tiny_tree, path, {"defenses": []}), tmp_path / "none")
    for off in ({"threshold": 0.0}, {"lowest": 0}):
        zero = tree_with(tiny_tree, path, {"defenses": [{"safelora": {"base": base_dir, **off}}]})
        assert distance(none, train(zero, tmp_path / f"zero-{next(iter(off))}")) == 0.0
    changed_by = []
    for threshold in (0.01, 0.4, 1.0):
        entry = {"safelora": {"base": base_dir, "projection": "orthogonal", "rank": 8, "threshold": threshold}}
        tree = tree_with(tiny_tree, path, {"defenses": [entry], "track": {"check_after": 1}})
        out = tmp_path / str(threshold)
        finished = run(run_from_tree(tree), out)
        projected = adapter(out)
        report = json.loads((out / "run.json").read_text())["defenses"].get("safelora")
        assert len(report["cosines"]) == 14 and report["step"] == 4
        assert set(report["projected"]) == {n for n, c in report["cosines"].items() if c < threshold}
        touched = {n for n in none if not torch.equal(none[n], projected[n])}
        assert touched == {f"base_model.model.{n}.lora_B.weight" for n in report["projected"]}
        records = [json.loads(line) for line in open(out / "metrics.jsonl")]
        assert records[-1]["defense/safelora/projected"] == len(touched)
        assert not any("defense/safelora/projected" in record for record in records[:-1])
        warned = any("had no effect through its weights hook" in note for note in finished.notes)
        assert warned is (not touched)  # a threshold may rightly select nothing: a note, not an error
        changed_by.append(sum(float((none[n] - projected[n]).square().sum()) for n in none))
    assert 0 <= changed_by[0] <= changed_by[1] <= changed_by[2] and changed_by[2] > changed_by[0]


@PATHS
def test_the_sampler_follows_the_projected_weights(tiny_tree, tmp_path, path, base_dir):
    """The optimizer goes on with the same parameters, and the last samples come from what is saved."""
    entry = {"safelora": {"base": base_dir, "threshold": 1.0, "every": 2}}
    synced = []
    tree = tree_with(tiny_tree, path, {"defenses": [entry], "schedule": {"steps": 5}})
    finished = run(run_from_tree(tree), tmp_path / "run")
    parts = finished.components
    assert parts.sampler.stale  # projected at the end, after the last rollout
    sampler = parts.sampler.synced()
    original = sampler.sync
    sampler.sync = lambda policy: synced.append(policy) or original(policy)
    assert finished.sampler is sampler and len(synced) == 1 and not parts.sampler.stale
    owned = {id(p) for group in parts.optimizer.param_groups for p in group["params"]}
    assert owned == {id(p) for p in parts.policy.trainable().values()}
    records = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    assert [i for i, r in enumerate(records) if r.get("defense/safelora/projected")] == [1, 3, 4]


def test_a_step_that_was_just_projected_is_not_projected_again_at_the_end(tiny_tree, tmp_path, base_dir):
    """The published C is no projector: twice would not be once."""
    results = {}
    for name, every in {"end": None, "fourth": 4}.items():
        entry = {"safelora": {"base": base_dir, "threshold": 1.0, "every": every}}
        results[name] = train(tree_with(tiny_tree, {"defenses": [entry]}), tmp_path / name)
    assert distance(results["end"], results["fourth"]) == 0.0


def test_weights_that_the_run_went_back_to_are_projected_once(tiny_model_dir, base_dir):
    """As after early stopping: those of a step that was projected are left alone, those of another one are not."""
    policy = nudge(load(tiny_model_dir))
    defense, _ = set_up(policy, base=base_dir, threshold=1.0, every=2)
    kept = {}
    with torch.no_grad():
        for step in range(1, 5):
            defense.weights(nudge(policy, seed=step), "step")
            kept[step] = policy.state_dict()
        again = SafeLoRA(base=base_dir, threshold=1.0, every=2)
        again.setup(SimpleNamespace(policy=policy, log=print))
        again.load_state_dict(json.loads(json.dumps(defense.state_dict())))
        for step, projects in {2: False, 3: True, 4: False, 1: True}.items():
            policy.load_state_dict(kept[step])
            assert again.weights(policy, "end") is projects, step
            assert (distance(kept[step], policy.state_dict()) > 0) is projects


def test_its_state_is_json_and_comes_back():
    defense = SafeLoRA(base="x")
    defense.steps, defense.projected_at, defense.cosines, defense.projected = 7, 6, {"a": 0.25}, ["a"]
    again = SafeLoRA(base="x")
    again.load_state_dict(json.loads(json.dumps(defense.state_dict())))
    assert again.state_dict() == defense.state_dict() and again.weights is not None
    assert len(DefenseStack([again])) == 1
