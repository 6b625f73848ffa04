"""The planning table: what fits, and by which means, follows from the estimator."""

from __future__ import annotations

from rlsafe.engine.plan.estimate import GIB
from rlsafe.engine.plan.planning import HARDWARE, RESERVE, plans, table


def test_larger_models_need_more_and_every_plan_fits_its_hardware():
    found = {(model, hardware.name): plan for model, hardware, plan in plans()}
    room = {hardware.name: RESERVE * hardware.memory * GIB for hardware in HARDWARE}
    assert all(plan.memory <= room[hardware] for (_, hardware), plan in found.items() if plan)
    one, eight = HARDWARE[1].name, HARDWARE[2].name
    assert found["Qwen/Qwen2.5-72B", one].quantization == "4bit" and found["Qwen/Qwen2.5-72B", HARDWARE[0].name] is None
    assert found["Qwen/Qwen2.5-72B", eight].sharding == "fsdp2" and found["Qwen/Qwen2.5-7B", eight].sharding == "ddp"
    # bfloat16 weights of 72 B alone are 135 GiB: an eighth of them, and what is gathered, activations and head on top
    assert 135 / 8 * GIB < found["Qwen/Qwen2.5-72B", eight].memory < 135 / 3 * GIB


def test_seconds_follow_from_flops_and_the_share_of_the_peak():
    models = ["Qwen/Qwen2.5-7B"]
    half, whole = ([plan.seconds for _, _, plan in plans(models, share) if plan] for share in (0.25, 0.5))
    assert [a / b for a, b in zip(half, whole, strict=True)] == [2.0] * len(half)
    tokens, peak = 16 * 1024, 989e12
    assert (
        abs(whole[1] - 6 * 7.6e9 * tokens / (0.5 * peak)) < 0.01 * whole[1]
    )  # no recompute: 4N, the frozen forward 2N
    assert table(models)[-1].startswith("| Qwen/Qwen2.5-7B | 2 hosts of 8 x 80 GiB (H100) | ddp_multinode.yaml |")
