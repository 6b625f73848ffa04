"""The projection of SafeLoRA by itself: what C does to an update, never formed as a matrix."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlsafe.defenses.safelora import cosine, directions, factor, project


@pytest.mark.parametrize("whole", [{"rank": 10_000}, {"energy": 1.0}])
@pytest.mark.parametrize("shape", [(24, 40), (24, 24), (40, 24)])
def test_an_orthogonal_projection_of_full_rank_is_the_identity(whole, shape):
    v = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    b = torch.randn(shape[0], 3)
    if "energy" in whole and shape[0] > shape[1]:
        b = v @ torch.randn(shape[1], 3)  # V's energy says nothing about what lies outside its column space
    left = directions(v, whole.get("rank"), whole.get("energy"))
    assert torch.allclose(project(left, b), b, atol=1e-4)


def test_published_c_is_no_projector_and_orthogonal_is():
    v = torch.randn(20, 30, generator=torch.Generator().manual_seed(0)).double()
    b = torch.randn(20, 4).double()
    once = project(factor(v), b)
    assert not torch.allclose(project(factor(v), once), once, rtol=0.5)
    left = directions(v, 5, None)
    once = project(left, b)
    assert torch.allclose(project(left, once), once) and not torch.allclose(once, b, rtol=0.5)


def test_an_update_outside_the_subspace_counts_as_pointing_away():
    a, b = torch.randn(2, 5), torch.randn(6, 2)
    assert cosine(a, b, torch.zeros_like(b)) == 0.0
    assert cosine(a, b, 3 * b) == pytest.approx(1.0)


@pytest.mark.parametrize("settings", [{}, {"rank": 8}, {"energy": 0.5}], ids=str)
def test_c_is_never_formed_for_a_wide_matrix(settings):
    out, width = 1536, 96
    v, b = torch.randn(out, width), torch.randn(out, 4)
    largest = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            outputs = result if isinstance(result, (tuple, list)) else [result]
            largest.append(max((t.numel() for t in outputs if isinstance(t, torch.Tensor)), default=0))
            return result

    with Sizes():
        left = factor(v) if not settings else directions(v, settings.get("rank"), settings.get("energy"))
        project(left, b)
    assert 0 < max(largest) <= out * width
