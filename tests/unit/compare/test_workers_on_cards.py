"""Workers of a comparison on a machine with GPUs: a card each."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlsafe.compare.grid.records import Directory
from rlsafe.compare.run import runner, workers
from rlsafe.config import ModelConfig, SamplerConfig, UserError


def cell(sampler=None, **model):
    settings = ModelConfig.model_validate({"name": "m", "lora": {"r": 4}, **model})
    return SimpleNamespace(config=SimpleNamespace(sampler=SamplerConfig.model_validate(sampler or {}), model=settings))


@pytest.fixture
def four(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_each_worker_has_a_card(four, monkeypatch):
    assert workers.placed(4) == ["0", "1", "2", "3"] and workers.placed(5)[-1] == "0"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-7")
    assert workers.placed(3) == ["5", "GPU-7", "5"]


def test_as_many_cells_run_as_there_are_cards(four):
    assert runner.suitable_jobs([cell()] * 9) == 4 and runner.suitable_jobs([cell()] * 2) == 2


@pytest.mark.parametrize(
    ("sampler", "model"),
    [({"sync": "merged"}, {}), ({}, {"lora": None}), ({}, {"quantization": "4bit"})],
)
def test_cells_that_send_whole_weights_to_a_server_run_one_at_a_time(four, sampler, model):
    """Each would sample with the weights that another one has just sent."""
    server = {"kind": "server", "urls": ["http://127.0.0.1:9"]}
    filling = [cell({**server, **sampler}, **model)] * 3
    assert runner.suitable_jobs(filling) == 1
    runner.check_jobs(filling, 1)
    for jobs in (0, 2):  # 0: as many as a Ray cluster has room for
        with pytest.raises(UserError, match="send full weights to servers.*--jobs 1"):
            runner.check_jobs(filling, jobs)
    runner.check_jobs([cell(server)] * 3, 2)


def test_without_a_gpu_nobody_is_placed():
    assert workers.placed(2) == [None, None]


def note(cell, out: Path) -> None:
    import time

    time.sleep(0.5)
    (out / f"{cell.id}.card").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", ""))


@pytest.mark.integration  # two processes of their own
def test_workers_see_their_card_only(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "placed", lambda jobs: ["5", "7"])
    cells = [SimpleNamespace(id=name) for name in "abcd"]
    workers.run_in_workers(note, cells, Directory(tmp_path), 2, lambda cell: None)
    assert {(tmp_path / f"{cell.id}.card").read_text() for cell in cells} <= {"5", "7"}
