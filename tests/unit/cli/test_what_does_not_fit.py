"""A dry run warns about what this machine is known not to hold."""

from __future__ import annotations

from dataclasses import fields

from rlsafe.engine.plan.estimate import GIB, Memory, unfit_here

NEED = Memory(**{field.name: GIB for field in fields(Memory)})


def test_too_little_memory_without_a_gpu_is_warned_about():
    assert unfit_here(NEED, False, 100 * GIB) == []
    [line] = unfit_here(NEED, False, 5 * GIB)
    assert "5.0 GiB of memory are free here, less than these 8.0 GiB" in line and line.startswith("  warning:")


def test_a_model_for_gpus_on_a_machine_without_is_warned_about():
    [line] = unfit_here(NEED, True, 1000 * GIB)
    assert "no GPU that torch can use" in line
