"""The persona defense with several signed vectors, on one layer and on several."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny_architectures import load, random_batch

from rlsafe.config import UserError
from rlsafe.defenses import build
from rlsafe.defenses.persona import Persona, save_vectors
from rlsafe.types import Where


def random_vectors():
    return torch.randn(3, 64, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    path = tmp_path_factory.mktemp("vectors") / "persona.safetensors"
    save_vectors(random_vectors(), path)
    return str(path)


def by_hand(policy, batch, additions):
    """Log-probs [B, T] of Hugging Face's own forward, with hooks of the test's own on blocks {number: vector}."""

    def adding(vector):
        return lambda _, __, out: (out[0] + vector, *out[1:]) if isinstance(out, tuple) else out + vector

    layers = policy.model.get_decoder().layers
    hooks = [layers[number].register_forward_hook(adding(vector)) for number, vector in additions.items()]
    logp = policy.core.model(batch.ids).logits[:, :-1].log_softmax(-1)
    for hook in hooks:
        hook.remove()
    return torch.nn.functional.pad(logp.gather(-1, batch.ids[:, 1:, None])[..., 0], (1, 0)) * batch.loss_mask


def test_signed_vectors_of_several_layers_add_up(tiny_model_dir, vectors):
    """sum_i alpha_i e_i, a negative alpha among them, against hooks of the test's own on both blocks."""
    policy, batch, v = load(tiny_model_dir), random_batch(), random_vectors()
    more = [{"layer": 1, "alpha": -0.2}, {"layer": 2, "alpha": 0.3}]
    defense = Persona(vectors, 1, 0.5, more)
    defense.setup(SimpleNamespace(policy=policy))
    with defense.activations(policy, Where("narrow", "sft", "train")):
        found = policy.score(batch)
    expected = by_hand(policy, batch, {0: 0.3 * v[1], 1: 0.3 * v[2]})
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, by_hand(policy, batch, {0: 0.3 * v[1]}), atol=1e-3)
    assert defense.effect()["steering_norm"] == pytest.approx(float((0.3 * torch.cat([v[1], v[2]])).norm()), rel=1e-5)
    assert (
        Persona(vectors, 1, 0.0, [{"layer": 2, "alpha": 0}]).strength == 0 and Persona(vectors, 1, -2.0).strength == 2
    )


def test_an_entry_of_more_that_is_wrong_is_one_line(vectors):
    for more, says in [
        ([{"layer": 2}], "more: expected {vectors, layer: number, alpha"),
        ([{"layr": 2}], "did you mean 'layer'"),
    ]:
        with pytest.raises(UserError, match=says):
            build([{"persona": {"vectors": vectors, "layer": 1, "more": more}}])
