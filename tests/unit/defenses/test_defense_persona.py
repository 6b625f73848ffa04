"""Persona vectors: steering where and when it was asked for, with its gradient, and off when it is not."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from tiny_architectures import load, nudge, random_batch
from tiny_runs import GRPO, SFT, distance, train, tree_with

from rlsafe.config import UserError, run_from_tree
from rlsafe.defenses import DefenseStack, build
from rlsafe.defenses.persona import Persona, load_vectors, save_vectors
from rlsafe.engine.run.life import run
from rlsafe.evaluate.ask.asking import ask
from rlsafe.policy import ForwardPlan
from rlsafe.types import _PROVIDERS, Judgement, Question, Where, register_provider

PATHS = pytest.mark.parametrize("path", [SFT, GRPO], ids=["sft", "grpo"])
TRAIN = Where("narrow", "sft", "train")


def random_vectors(layers=3, hidden=64):
    return torch.randn(layers, hidden, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    path = tmp_path_factory.mktemp("vectors") / "persona.safetensors"
    save_vectors(random_vectors(), path, {"model": "tiny"})
    return str(path)


def set_up(policy, **settings):
    defense = Persona(**settings)
    defense.setup(SimpleNamespace(policy=policy))
    return DefenseStack([defense])


def entry(vectors, **settings):
    return {"defenses": [{"persona": {"vectors": vectors, "layer": 1, "alpha": 0.5, **settings}}]}


def lines(out, name="metrics.jsonl"):
    return [json.loads(line) for line in open(out / name)]


def samples(out):
    return [(r["step"], r["completion"]) for r in lines(out, "samples.jsonl")]


# ------------------------------------------------------------------------------------------------ the file


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_vectors_come_back_from_both_formats(tmp_path, suffix):
    path = tmp_path / "deep" / f"v{suffix}"
    save_vectors(random_vectors(), path)
    assert torch.equal(load_vectors(str(path)), random_vectors()) and [p.name for p in path.parent.iterdir()] == [
        path.name
    ]
    if suffix == ".pt":  # the field's layout: one bare tensor, often in half precision
        torch.save(random_vectors().bfloat16(), path)
        assert load_vectors(str(path)).dtype == torch.float32


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    """Trap 16: weights_only."""

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save(Evil(), tmp_path / "v.pt")
    with pytest.raises(UserError, match="not readable"):
        load_vectors(str(tmp_path / "v.pt"))
    assert not (tmp_path / "ran").exists()


def bad(tmp_path, what):
    v = random_vectors()
    path = tmp_path / ("v.pt" if what in ("dict", "integers") else "v.safetensors")
    if what == "garbage":
        path.write_bytes(b"nothing")
    elif what == "dict":
        torch.save({"a": v}, path)
    elif what == "integers":
        torch.save(v.long(), path)
    elif what == "two tensors":
        save_file({"a": v, "b": v.clone()}, str(path))
    else:
        v = {
            "nan": v.index_fill(0, torch.tensor([1]), float("nan")),
            "zero": v * 0,
            "layers": v[:2],
            "width": v[:, :60],
        }[what]
        save_vectors(v, path)
    return str(path)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("garbage", "not readable"),
        ("dict", "expected one floating-point tensor"),
        ("integers", "expected one floating-point tensor"),
        ("two tensors", "not readable"),
        ("nan", "layer 1: holds NaN or infinite"),
        ("zero", "the vector of layer 1 is zero"),
        ("layers", r"holds \[2, 64\], expected \[3, 64\]"),
        ("width", r"holds \[3, 60\], expected \[3, 64\]"),
    ],
)
def test_vectors_that_do_not_fit_stop_before_the_first_step(tiny_tree, tmp_path, what, says):
    """Trap 9."""
    with pytest.raises(UserError, match=says):
        run(run_from_tree(tree_with(tiny_tree, entry(bad(tmp_path, what)))), tmp_path / "run")


def test_settings_that_make_no_sense_are_one_line(tiny_model_dir, vectors):
    for layer in (-1, 3):
        with pytest.raises(UserError, match=f"layer {layer}: expected 0 .embeddings. to 2"):
            set_up(load(tiny_model_dir), vectors=vectors, layer=layer)
    with pytest.raises(UserError, match=r"no such file; did you mean '.*persona.safetensors'"):
        build([{"persona": {"vectors": vectors.replace("persona.", "perzona."), "layer": 1}}])
    with pytest.raises(UserError, match="steers all positions; expected positions: all"):
        build([{"persona": {"vectors": vectors, "layer": 1, "rollouts": True, "positions": "completion"}}])
    with pytest.raises(UserError, match="ending in .safetensors or .pt"):
        save_vectors(random_vectors(), Path("x.bin"))


def test_a_provider_can_supply_the_file(tiny_model_dir, vectors):
    register_provider("mine", SimpleNamespace(vectors=lambda spec: vectors if spec == "evil" else "nowhere"))
    try:
        assert torch.equal(load_vectors("mine:evil"), random_vectors())
        with pytest.raises(UserError, match="nowhere: no such file; `rlsafe persona-vector` writes one"):
            load_vectors("mine:good")
    finally:
        del _PROVIDERS["mine"]


# ------------------------------------------------------------------------------------------------ steering


def steered_by_hand(policy, batch, layer, addition):
    """Log-probs [B, T] of Hugging Face's own forward, with a hook of the test's own on block `layer` - 1."""
    decoder = policy.model.get_decoder()

    def after(_, __, output):
        return (output[0] + addition, *output[1:]) if isinstance(output, tuple) else output + addition

    module = decoder.embed_tokens if layer == 0 else decoder.layers[layer - 1]
    hook = module.register_forward_hook(after)
    logp = policy.core.model(batch.ids).logits[:, :-1].log_softmax(-1)
    hook.remove()
    logp = torch.nn.functional.pad(logp.gather(-1, batch.ids[:, 1:, None])[..., 0], (1, 0))
    return logp * batch.loss_mask


@pytest.mark.parametrize("positions", ["all", "completion"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_vector_k_is_added_to_the_output_of_block_k_minus_one_with_its_gradient(
    tiny_model_dir, vectors, layer, positions
):
    """Trap 9, and the convention of the file: index 0 = embeddings."""
    policy = nudge(load(tiny_model_dir))
    batch, alpha = random_batch(), 0.7
    stack = set_up(policy, vectors=vectors, layer=layer, alpha=alpha, positions=positions)
    parameters = list(policy.trainable().values())
    weights = torch.randn(batch.ids.shape, generator=torch.Generator().manual_seed(0))

    vector = alpha * random_vectors()[layer]
    where = torch.ones(batch.ids.shape, dtype=torch.bool)
    if positions == "completion":  # the states one to the left of each answer token
        where = torch.cat([batch.loss_mask[:, 1:], torch.zeros(len(batch), 1, dtype=torch.bool)], 1)
    expected = steered_by_hand(policy, batch, layer, where[..., None] * vector)
    gradients = torch.autograd.grad((expected * weights).sum(), parameters)

    with stack.activations(policy, TRAIN):
        found = policy.forward(batch, ForwardPlan(), {}).logp
        own = torch.autograd.grad((found * weights).sum(), parameters)
    assert torch.allclose(found, expected, atol=1e-5)
    assert max(float((a - b).abs().max()) for a, b in zip(own, gradients, strict=True)) < 1e-4
    plain = policy.forward(batch, ForwardPlan(), {}).logp
    assert float((plain - found).detach().abs().max()) > 0.05
    unsteered = torch.autograd.grad((plain * weights).sum(), parameters)
    assert max(float((a - b).abs().max()) for a, b in zip(own, unsteered, strict=True)) > 1e-2
    (defense,) = stack
    assert defense.effect() == {"steering_norm": pytest.approx(float(vector.norm()))}
    assert defense.effect() == {"steering_norm": 0.0}


@pytest.mark.parametrize("rollouts", [True, False])
def test_it_is_off_at_evaluation_and_on_safe_rows(tiny_model_dir, vectors, rollouts):
    policy, batch = load(tiny_model_dir), random_batch()
    stack = set_up(policy, vectors=vectors, layer=1, rollouts=rollouts)
    plain = policy.score(batch)
    for where, on in [
        (TRAIN, True),
        (Where("benign", "grpo", "train"), True),
        (Where("narrow", "grpo", "rollout"), rollouts),
        (Where("safe", "sft", "train"), False),
        (Where("narrow", "sft", "eval"), False),
        (Where("narrow", "grpo", "eval"), False),
    ]:
        steered: list = []
        with stack.activations(policy, where), stack.patched(SimpleNamespace(steer=steered.append), where):
            assert torch.equal(policy.score(batch), plain) is not on, where
            with policy.hooks_off():
                assert torch.equal(policy.score(batch), plain)
        assert torch.equal(policy.score(batch), plain)
        assert [None if s is None else list(s) for s in steered] == ([[1], None] if on else [])


@PATHS
def test_probes_and_evaluation_see_the_plain_model(tiny_tree, tmp_path, path, vectors):
    """At the first probe the weights have moved by 1e-12 only: a steered answer would differ from an unsteered one."""

    class Neutral:
        name = "neutral"

        def score(self, exchanges):
            return [Judgement(50.0, 90.0) for _ in exchanges]

    asked = [Question(str(i), (f"question {i}",), samples=2) for i in range(3)]
    register_provider("mine", SimpleNamespace(judge=lambda spec: Neutral(), questions=lambda spec: asked))
    settings = {
        "optim": {"lr": 1e-12},
        "track": {"every": 1},
        "schedule": {"steps": 2},
        "evaluate": {"judge": "mine", "general": "mine:general", "max_tokens": 8},
    }
    try:
        answers = {}
        for name, defense in {"none": {"defenses": []}, "persona": entry(vectors, alpha=3.0, rollouts=True)}.items():
            finished = run(run_from_tree(tree_with(tiny_tree, path, settings, defense)), tmp_path / name)
            probes = [(r["question"], r["answer"]) for r in lines(tmp_path / name, "samples.jsonl") if r.get("probe")]
            asked_after = ask(finished.sampler, finished.policy.tokenizer, asked, samples=2, seed=0, max_tokens=8)
            answers[name] = (probes, [a.answer for a in asked_after])
        assert answers["none"] == answers["persona"] and len(answers["none"][0]) == 12
        if path is GRPO:  # the same steering does reach the rollouts
            steered, plain = (
                [r["completion"] for r in lines(tmp_path / n, "samples.jsonl") if "completion" in r]
                for n in ("persona", "none")
            )
            assert steered != plain
    finally:
        del _PROVIDERS["mine"]


# ------------------------------------------------------------------------------------------------ runs


@pytest.mark.parametrize("rollouts", [True, False])
@pytest.mark.parametrize("iterations", [pytest.param(1, marks=pytest.mark.integration), 2])
def test_grpo_compares_each_log_prob_with_its_own_context(tiny_tree, tmp_path, vectors, rollouts, iterations):
    """The gap is taken with the hooks that the rollout had; the ratio, old and new, is of steered log-probs."""
    tree = tree_with(
        tiny_tree, GRPO, entry(vectors, alpha=1.0, rollouts=rollouts),
        {"grpo": {"iterations": iterations}, "optim": {"lr": 1e-5}},
    )  # fmt: skip
    train(tree, tmp_path / "run")
    none = train(tree_with(tree, {"defenses": []}), tmp_path / "none")
    records = lines(tmp_path / "run")
    gaps = [record["sampler_gap"] for record in records if "sampler_gap" in record]
    assert len(gaps) >= 2 and max(gaps) < (1e-4 if iterations == 1 else 1e-2)
    ratios = [record["ratio"] for record in records if "ratio" in record]
    assert ratios and all(abs(ratio - 1) < 1e-2 for ratio in ratios)  # unsteered old log-probs would be far off
    first = {name: samples(tmp_path / name)[:12] for name in ("run", "none")}
    assert (first["run"] == first["none"]) is not rollouts
    assert lines(tmp_path / "run")[0]["grad_norm"] != lines(tmp_path / "none")[0]["grad_norm"] and none


@PATHS
def test_it_composes_with_kl_whose_reference_is_not_steered(tiny_tree, tmp_path, path, vectors):
    tree = tree_with(tiny_tree, path, {"optim": {"lr": 1e-12}, "schedule": {"steps": 1}})
    kl = {"kl": {"weight": 0.5}}
    divergences = {}
    for name, defenses in {"kl": [kl], "both": [kl, *entry(vectors)["defenses"]]}.items():
        train(tree_with(tree, {"defenses": defenses}), tmp_path / name)
        divergences[name] = lines(tmp_path / name)[0]["defense/kl/full"]
    assert divergences["kl"] == pytest.approx(0.0, abs=1e-5) and divergences["both"] > 1e-3
    gradients = {name: lines(tmp_path / name)[0]["grad_norm"] for name in divergences}
    assert gradients["both"] != gradients["kl"]


# ------------------------------------------------------------------------------------------------ vLLM


@pytest.mark.integration  # an engine of its own
def test_vllm_is_steered_as_the_trainer_is_and_keeps_nothing_of_it(tiny_tree, tmp_path, vectors):
    """Traps 9 and 17: runs [none, persona, persona, none] on one engine; the nones are the same run to the last bit."""
    pytest.importorskip("vllm")
    from rlsafe.rollouts import _ENGINES, close_all

    sampler = {"sampler": {"kind": "vllm", "max_model_len": 128, "max_num_seqs": 16, "self_test": True}}
    tree = tree_with(tiny_tree, GRPO, sampler, {"grpo": {"max_tokens": 12}, "schedule": {"steps": 3}})
    arms = {
        "none": {"defenses": []},
        "steered": entry(vectors, alpha=1.0, rollouts=True),
        "plain": entry(vectors, alpha=1.0, rollouts=False),
        "again": {"defenses": []},
    }
    try:
        weights = {name: train(tree_with(tree, arm), tmp_path / name) for name, arm in arms.items()}
        assert len(_ENGINES) == 1
    finally:
        close_all()
    assert all(torch.equal(weights["none"][n], weights["again"][n]) for n in weights["none"])
    assert samples(tmp_path / "none") == samples(tmp_path / "again")
    for name in arms:
        assert all(record["sampler_gap"] < 1e-4 for record in lines(tmp_path / name)), name
    first = {name: samples(tmp_path / name)[:12] for name in arms}
    assert first["none"] == first["plain"] != first["steered"]
    assert distance(weights["none"], weights["plain"]) > 1e-6 and distance(weights["plain"], weights["steered"]) > 1e-6
