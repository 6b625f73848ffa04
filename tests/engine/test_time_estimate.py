"""How long a run takes, before it starts: work that doubles takes twice as long, and a dry run says it where a CPU will train."""

import pytest

from rlsafe.config import load_run
from rlsafe.engine.plan.timing import START, Load, Speed, sampling, seconds, shown, speed_of
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
    assert seconds(full, shape, Load(trained=1000), SPEED)[0] == pytest.approx(1.5 * once)  # gradients of the weights
    checkpointing = config.model.model_copy(update={"gradient_checkpointing": True})
    again = config.model_copy(update={"model": checkpointing})
    assert seconds(again, shape, Load(trained=1000), SPEED)[0] == pytest.approx(1.5 * once)  # one more forward
    assert seconds(config, shape, Load(trained=1000), Speed(25e9, 10e9))[0] == pytest.approx(2 * once)


def test_sampling_together_is_cheaper_than_one_by_one(small):
    config, shape = small
    _, together = seconds(config, shape, sampling(32, 50, 100, 32), SPEED)
    _, apart = seconds(config, shape, sampling(32, 50, 100, 1), SPEED)
    assert START < together < apart / 4
    assert sampling(0, 50, 100, 32) == Load()


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
