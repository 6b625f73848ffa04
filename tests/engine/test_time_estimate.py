"""How long a run takes, before it starts: work that doubles takes twice as long, and a dry run says it where a CPU will train."""

from dataclasses import replace

import pytest

from rlsafe.config import load_run
from rlsafe.engine.plan.timing import Load, Speed, sampling, seconds, shown, speed_of
from rlsafe.policy.shapes import model_shape

SPEED = Speed(flops=50e9, bandwidth=10e9)


@pytest.fixture(scope="module")
def small():
    config = load_run("configs/qwen2.5-coder-0.5b/sft_code.yaml")
    return config, model_shape(config.model, config.model.name)


def test_training_time_grows_with_tokens_and_passes(small):
    config, shape = small
    once, none = seconds(config, shape, Load(trained=1000), SPEED)
    assert none == 0 and seconds(config, shape, Load(trained=2000), SPEED)[0] == pytest.approx(2 * once)
    full = config.model_copy(update={"model": config.model.model_copy(update={"lora": None})})
    checkpointing = config.model.model_copy(update={"gradient_checkpointing": True})
    again = config.model_copy(update={"model": checkpointing})
    for dearer in (full, again):  # gradients of the weights; one more forward
        assert 1.3 * once < seconds(dearer, shape, Load(trained=1000), SPEED)[0] < 1.5 * once
    assert 1.7 * once < seconds(config, shape, Load(trained=1000), Speed(25e9, 10e9))[0] < 2 * once


def test_sampling_together_is_cheaper_than_one_by_one(small):
    config, shape = small
    _, together = seconds(config, shape, sampling(32, 50, 90, 100, 32), SPEED)
    _, apart = seconds(config, shape, sampling(32, 50, 90, 100, 1), SPEED)
    assert together < apart / 3
    assert sampling(0, 50, 100, 100, 32) == Load()
    assert sampling(64, 1, 10, 25, 32).steps == 20 + 15, (
        "places that come free are filled; the longest answer comes last"
    )
    assert sampling(64, 1, 10, 25, 32, calls=4).steps == 4 * (10 + 15)


MEASURED = [
    # what; model; speed of a large product with the run's threads; load; seconds measured (two cores, AVX2, 2026-11-28)
    ("an SFT step, two threads", "smollm2", 152e9, Load(trained=2351, passes=6), 18.2),
    ("an SFT step, one thread", "smollm2", 76e9, Load(trained=868, passes=3), 9.6),
    ("a GRPO update, one thread", "smollm2", 76e9, Load(trained=1814, passes=3), 18.2),
    ("an SFT step with KL", "smollm2", 76e9, Load(trained=868, forwarded=868, compared=868, passes=4), 16.6),
    ("rollouts, 16 x 68 of 80 tokens", "smollm2", 76e9, sampling(16, 8, 68, 80, 256) + Load(syncs=1), 19.0),
    ("an SFT step", "organism", 76e9, Load(trained=241, passes=3), 0.048),
    ("a GRPO update", "organism", 76e9, Load(trained=1947, passes=3), 0.31),
    ("a GRPO update with KL", "organism", 76e9, Load(trained=1936, forwarded=1936, compared=1936, passes=4), 0.58),
    ("rollouts, 64 x 16 of 40 tokens", "organism", 76e9, sampling(64, 2, 16, 40, 256) + Load(syncs=1), 0.47),
    ("926 answers, 760 of them read, 157 pairs", "organism", 76e9,
     sampling(926, 14, 16, 40, 256) + Load(forwarded=760 * 30 + 314 * 28), 6.3),
]  # fmt: skip


@pytest.mark.parametrize("what, model, flops, load, measured", MEASURED, ids=[case[0] for case in MEASURED])
def test_what_was_measured_is_foretold_within_30_percent(what, model, flops, load, measured):
    dims = {"organism": (4, 128, 2910, 802816, 32768), "smollm2": (30, 576, 49152, 106168320, 4884480)}[model]
    layers, hidden, vocab, linear, adapter = dims
    config = load_run("configs/organism/sft_medical.yaml")
    shape = replace(
        model_shape(config.model, "Qwen/Qwen2.5-0.5B"),
        layers=layers,
        hidden=hidden,
        vocab=vocab,
        linear=linear,
        adapter=adapter,
    )
    assert sum(seconds(config, shape, load, Speed(flops, 10e9))) == pytest.approx(measured, rel=0.3)


def test_the_machine_is_asked():
    speed = speed_of("float32", 1)
    assert 1e8 < speed.flops < 1e13 and 1e8 < speed.bandwidth < 1e13


@pytest.mark.parametrize(("value", "text"), [(12.3, "12 s"), (600, "10 min"), (7200, "2.0 h")])
def test_times_are_for_people(value, text):
    assert shown(value) == text


def test_a_dry_run_on_a_cpu_says_how_long(monkeypatch):
    import rlsafe
    from rlsafe.engine.run import dry

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(dry, "speed_of", lambda dtype, threads: SPEED)
    run = rlsafe.train("configs/organism/grpo_medical.yaml", dry_run=True)
    [line] = [line for line in run.plan if line.startswith("time on this CPU")]
    assert "training" in line and "sampling" in line


def test_cells_that_run_at_the_same_time_share_the_machine(monkeypatch):
    """Half the time with two workers, each with its share of the threads, and one engine each for all their cells."""
    from rlsafe.compare import dry_compare
    from rlsafe.engine.run import dry

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    asked = []
    monkeypatch.setattr(dry, "speed_of", lambda dtype, threads: asked.append(threads) or SPEED)
    times = {}
    for jobs in (1, 2):
        lines = dry_compare("configs/qwen2.5-coder-0.5b/compare.yaml", ["none", "kl"], ["sft"], quick=True, jobs=jobs)
        [line] = [line for line in lines if line.startswith("time on this CPU")]
        assert ("2 runs at a time" in line) is (jobs == 2)
        times[jobs] = float(line.split("about ")[1].split(" min")[0])
    assert {2, 1} == set(asked) and times[2] == pytest.approx(times[1] / 2, abs=1.5)
