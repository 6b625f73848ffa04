# ruff: noqa: F811  (a fixture is taken by its name)
"""Several processes: one engine each on its own device, beside a process group that outlives it."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.distributed as dist
from scale import train
from stand_in_vllm import vllm  # noqa: F401
from tiny_architectures import load
from tiny_runs import adapter, distance, tree_with

from rlsafe.config import SamplerConfig, UserError, run_from_tree
from rlsafe.engine.run.life import run
from rlsafe.rollouts import CannotRun, make_sampler, ranks
from rlsafe.types import Request, RunError, SamplingParams

CONFIG = SamplerConfig(kind="vllm")


@pytest.fixture
def policy(tiny_model_dir):
    return load(tiny_model_dir)


@pytest.fixture
def two(monkeypatch):
    """This process as the second of two; `two` are the errors that the first one reports, one for each exchange."""
    said: list = []

    def gather(into, mine):
        into[:] = [said.pop(0) if said else (0.0 if isinstance(mine, float) else None), mine]

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda *_: 2)
    monkeypatch.setattr(dist, "get_rank", lambda *_: 1)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "1" if name != "WORLD_SIZE" else "2")
    return said


def test_each_rank_has_an_engine_on_its_own_device(policy, vllm, two, tiny_model_dir):
    make_sampler(CONFIG, tiny_model_dir, policy, 0)
    settings = vllm.made[0].settings
    assert settings["distributed_executor_backend"] == "external_launcher" and settings["tensor_parallel_size"] == 1


def test_ranks_that_share_an_engine_pool_their_requests(policy, vllm, two, tiny_model_dir, monkeypatch):
    monkeypatch.setattr(dist, "new_subgroups", lambda size, **_: ("the team", []))
    monkeypatch.setattr(
        dist, "all_gather_object", lambda into, mine, group=None: into.__setitem__(slice(None), [mine, mine])
    )
    sampler = make_sampler(CONFIG.model_copy(update={"tensor_parallel": 2}), tiny_model_dir, policy, 0)
    assert vllm.made[0].settings["tensor_parallel_size"] == 2
    asked = []
    monkeypatch.setattr(
        sampler, "_generate", lambda pool, _: asked.append([r.seed for r in pool]) or [r.seed for r in pool]
    )

    def gather(into, mine, group=None):
        assert group == "the team"
        into[:] = [[Request([1], 7), Request([2], 8)], mine]

    monkeypatch.setattr(dist, "all_gather_object", gather)
    assert sampler.generate([Request([3], 9)], SamplingParams(max_tokens=1)) == [9]
    assert sampler.generate([], SamplingParams(max_tokens=1)) == []
    assert asked == [[7, 8, 9], [7, 8]]


@pytest.mark.parametrize("size", [2, 3])
def test_processes_that_cannot_share_an_engine_are_told(policy, vllm, tiny_model_dir, size):
    with pytest.raises(
        UserError, match=rf"sampler.tensor_parallel: {size} processes share an engine, and the run has 1"
    ):
        make_sampler(CONFIG.model_copy(update={"tensor_parallel": size}), tiny_model_dir, policy, 0)


@pytest.mark.parametrize("more", [{"kind": "transformers"}, {"kind": "server", "urls": ["http://localhost:1"]}])
def test_other_samplers_have_no_engine_to_share(more):
    with pytest.raises(ValueError, match="tensor_parallel"):
        SamplerConfig(tensor_parallel=2, **more)


def test_one_process_names_no_executor(policy, vllm, tiny_model_dir):
    make_sampler(CONFIG, tiny_model_dir, policy, 0)
    assert "distributed_executor_backend" not in vllm.made[0].settings


def test_what_stops_one_rank_stops_all_in_the_same_words(policy, vllm, two, tiny_model_dir):
    two += [
        None,
        (True, "sampler.kind: vLLM cannot run it"),
    ]  # first all have the memory, then the first one's engine fails
    with pytest.raises(CannotRun, match="vLLM cannot run it"):
        make_sampler(CONFIG, tiny_model_dir, policy, 0)
    assert not vllm.made[0].open


def test_an_engine_that_ends_leaves_the_trainers_group(policy, vllm, two, tiny_model_dir, monkeypatch):
    ended = []
    monkeypatch.setattr(dist, "destroy_process_group", lambda group=None: ended.append(group))
    make_sampler(CONFIG, tiny_model_dir, policy, 0).close()
    assert ended == []
    dist.destroy_process_group("its own")
    assert ended == ["its own"]


def test_an_engine_that_ends_leaves_what_others_share_with_it(policy, vllm, tiny_model_dir, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # on CPUs several live side by side
    cleaned = []
    core = sys.modules["vllm.v1.engine.core"]
    monkeypatch.setattr(core, "cleanup_dist_env_and_memory", lambda: cleaned.append(1))
    one, other = (make_sampler(CONFIG, tiny_model_dir, policy, 0, steerable=flag) for flag in (False, True))
    if one is other:  # an eager engine serves both on a CPU
        other = make_sampler(CONFIG.model_copy(update={"max_num_seqs": 7}), tiny_model_dir, policy, 0)
    one.close()
    assert cleaned == []
    other.close()
    assert cleaned == [1]


def test_ranks_judge_a_gap_alike(two):
    two.append(0.3)
    assert ranks.largest(0.1) == 0.3


@pytest.mark.slow
@pytest.mark.parametrize("shared", [1, 2])
def test_two_processes_with_an_engine_each_or_one_for_both_train_what_one_trains(tiny_tree, tmp_path, shared):
    pytest.importorskip("vllm")
    grpo = {"schedule": {"steps": 2, "phases": [{"cycle": ["grpo"]}]}, "sampler": {"kind": "vllm"}}
    tree = tree_with(tiny_tree, grpo, {"optim": {"lr": 1e-3}})
    run(run_from_tree(tree), tmp_path / "one")
    printed = train("cpu_ddp", tree_with(tree, {"sampler": {"tensor_parallel": shared}}), tmp_path / "two")
    assert "Traceback" not in printed
    assert distance(adapter(tmp_path / "one"), adapter(tmp_path / "two")) < 2e-5


def test_work_is_shared_and_everyone_has_all_of_it_in_order(two):
    two.append(["0", "2", "4"])
    assert ranks.shared(list(range(5)), lambda mine: [str(i) for i in mine]) == ["0", "1", "2", "3", "4"]


class Echo:
    name = "echo"

    def __init__(self):
        self.asked = []

    def generate(self, requests, params):
        self.asked.append(list(requests))
        return [f"answer to {request}" for request in requests]


def test_the_second_rank_answers_its_share_until_it_is_released(two, monkeypatch):
    told = [(["a", "b", "c"], None), (["d"], None), None]
    monkeypatch.setattr(dist, "new_group", lambda **_: None)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda box, **_: box.__setitem__(0, told.pop(0)))
    two += [["answer to a", "answer to c"], ["answer to d"]]
    sampler = Echo()
    with ranks.spread(sampler) as spread:
        assert spread is None and told == []
    assert sampler.asked == [["b"], []]


@pytest.fixture
def first(two, monkeypatch):
    """This process as the first of two; gives what it tells the second, in order."""
    told: list = []
    monkeypatch.setattr(dist, "get_rank", lambda *_: 0)
    monkeypatch.setattr(dist, "all_gather_object", lambda into, mine: into.__setitem__(slice(None), [mine, []]))
    monkeypatch.setattr(dist, "new_group", lambda **_: None)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda box, **_: told.append(list(box)))
    return told


def test_the_others_are_released_when_the_first_rank_fails_between_two_requests(first):
    with pytest.raises(RunError, match="the judge is out"), ranks.spread(Echo()) as spread:
        assert spread.generate(["a"], None) == ["answer to a"]
        raise RunError("the judge is out")
    assert first == [[(["a"], None)], [None]]


def test_a_first_rank_that_fails_while_all_sample_waits_for_nobody(first):
    """The second is in another collective then: it would hear of no release, and the first would wait for it."""

    class Broken(Echo):
        def generate(self, requests, params):
            raise UserError("too long")

    with pytest.raises(UserError, match="too long"), ranks.spread(Broken()) as spread:
        spread.generate(["a"], None)
    assert first == [[(["a"], None)]]


def test_what_the_first_rank_finds_all_have(first, two, monkeypatch):
    assert ranks.of_first(lambda: 7) == 7 and first == [[7, None]]
    monkeypatch.setattr(dist, "get_rank", lambda *_: 1)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda box, **_: box.__setitem__(slice(None), first.pop()))
    assert ranks.of_first(lambda: pytest.fail("asked on the second rank")) == 7
    for error in (UserError("no such file"), RunError("the judge is out")):
        first.append([None, error])
        with pytest.raises(type(error), match=str(error)):
            ranks.of_first(lambda: pytest.fail("asked on the second rank"))


def test_only_the_first_rank_asks_the_judge_about_a_probe(two, monkeypatch):
    from rlsafe.evaluate import Probe

    class Judge:
        name = "judge"

        def score(self, exchanges):
            raise AssertionError("asked")

    probe = Probe([], [], Judge(), None, 2, 2, 8, 0)
    assert probe.finish(probe.start(Echo(), 0)) == ({}, [])


@pytest.mark.slow
def test_two_processes_probe_and_evaluate_what_one_does(tiny_tree, tmp_path, narrow_file):
    import json

    more = {
        "track": {"every": 1, "questions": 2, "samples": 2},
        "evaluate": {"benign": [narrow_file], "benign_limit": 5, "max_tokens": 4},
    }
    tree = tree_with(tiny_tree, {"schedule": {"steps": 1}}, more)
    one = tmp_path / "one.yaml"
    one.write_text(json.dumps(tree))
    from rlsafe.engine.run.life import train as train_here

    train_here(one, out=tmp_path / "one")
    train("cpu_ddp", tree, tmp_path / "two")
    scores = [json.loads((tmp_path / name / "evaluation.json").read_text())["benign"] for name in ("one", "two")]
    assert scores[0] == scores[1]
