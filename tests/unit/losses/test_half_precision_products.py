"""A trained head's gradient where the fused float32 product of bfloat16 matrices is not there."""

import pytest
import torch

from rlsafe.losses import head


def test_the_missing_kernel_is_replaced_by_one_of_the_same_precision(monkeypatch):
    monkeypatch.setattr(head, "_widens", lambda a: a.dtype in head.HALF)  # as on a GPU
    torch.manual_seed(0)
    a, b, total = torch.randn(8, 5).bfloat16(), torch.randn(5, 7).bfloat16(), torch.randn(8, 7)

    def missing(*_, **__):
        raise NotImplementedError("addmm with out_dtype")

    monkeypatch.setattr(torch, "addmm", missing)
    expected = total + a.float() @ b.float()
    head._accumulate(total, a, b)
    assert torch.equal(total, expected)


def test_a_lack_of_memory_is_no_missing_kernel(monkeypatch):
    monkeypatch.setattr(head, "_widens", lambda a: True)

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "addmm", full)
    with pytest.raises(torch.OutOfMemoryError):
        head._accumulate(torch.zeros(2, 2), torch.zeros(2, 2), torch.zeros(2, 2))
