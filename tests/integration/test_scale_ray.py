"""Grids on Ray: the same results as on this machine alone, lost cells run again, clear words about what cannot run."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from tiny_runs import adapter

from rlsafe.cli import main
from rlsafe.compare import compare
from rlsafe.compare.run.backends_ray import RayCluster

ray = pytest.importorskip("ray")


@pytest.fixture
def grid(tiny_tree, narrow_file, tmp_path) -> Path:
    """Two cells, none and kl, over the tiny model."""
    tree = {**tiny_tree, "schedule": {"steps": 2, "phases": [{"cycle": ["sft"]}]}}
    tree["evaluate"] = {"benign": [narrow_file], "benign_limit": 2, "max_tokens": 4}
    path = tmp_path / "grid.yaml"
    path.write_text(
        json.dumps({"run": tree, "paths": {"sft": {}}, "defenses": {"none": [], "kl": ["kl"]}, "seeds": [0]})
    )
    return path


CELLS = ("sft--none--seed0", "sft--kl--seed0")


def same(one: Path, other: Path) -> bool:
    """Whether two comparisons have the same adapters, bit for bit, and the same results but for the time they took."""
    pairs = [(adapter(one / "cells" / cell), adapter(other / "cells" / cell)) for cell in CELLS]
    rows = [(out / "results.csv").read_text().splitlines() for out in (one, other)]
    rows = [[row.rpartition(",")[0] for row in lines] for lines in rows]  # the last column is seconds
    return rows[0] == rows[1] and all(torch.equal(a[name], b[name]) for a, b in pairs for name in a)


@pytest.mark.slow
def test_a_cluster_of_this_machine_gives_the_results_of_the_local_backend(grid, tmp_path):
    compare(grid, jobs=1, out=tmp_path / "local")
    done = compare(grid, out=tmp_path / "ray", ray=RayCluster(cpus=0.5))
    assert done.failed == {} and same(tmp_path / "local", tmp_path / "ray")
    records = [json.loads((tmp_path / "ray" / "cells" / cell / "cell.json").read_text()) for cell in CELLS]
    assert [record["status"] for record in records] == ["done", "done"]
    assert "--backend ray --cell-cpus 0.5" in json.loads((tmp_path / "ray" / "comparison.json").read_text())["command"]


def killer(directory: Path, times: int) -> str:
    """A defense that kills its own process in the first step, the first `times` times."""
    path = directory / "killer.py"
    path.write_text(
        "import os, pathlib, signal, rlsafe\n"
        "@rlsafe.defense('killer')\n"
        "class Killer(rlsafe.Defense):\n"
        "    def prompt(self, messages, where):\n"
        f"        marks = sorted(pathlib.Path({str(directory)!r}).glob('killed-*'))\n"
        f"        if len(marks) < {times}:\n"
        f"            pathlib.Path({str(directory)!r}, f'killed-{{len(marks)}}').touch()\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return messages\n"
    )
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize(("times", "survives"), [(1, True), pytest.param(9, False, marks=pytest.mark.slow)])
def test_a_lost_cell_runs_again_and_costs_no_other(grid, tmp_path, times, survives):
    config = json.loads(grid.read_text())
    config["run"]["plugins"] = [killer(tmp_path, times)]
    config["defenses"]["kl"] = ["kl", "killer"]
    grid.write_text(json.dumps(config))
    done = compare(grid, out=tmp_path / "ray", ray=RayCluster(retries=1))
    assert len(list(tmp_path.glob("killed-*"))) == (1 if survives else 2)
    assert set(done.failed) == (set() if survives else {"sft--kl--seed0"})
    assert survives or "process died" in done.failed["sft--kl--seed0"] and "2 times" in done.failed["sft--kl--seed0"]
    assert (tmp_path / "ray" / "cells" / "sft--none--seed0" / "adapter").is_dir()


@pytest.mark.slow
def test_an_existing_cluster_is_found_by_its_address(grid, tmp_path):
    head = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--port=0", "--num-cpus=1", "--block"]
    place = tempfile.mkdtemp(prefix="ray-")  # a short path: Ray's sockets are in it
    head += ["--object-store-memory=100000000", "--include-dashboard=false", f"--temp-dir={place}"]
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # a cluster runs what it is sent
    environment = {**os.environ, **own, "PYTHONUNBUFFERED": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    process = subprocess.Popen(head, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    try:
        lines = iter(process.stdout.readline, "")
        address = next(line.split("--address='")[1].split("'")[0] for line in lines if "--address='" in line)
        compare(grid, jobs=1, out=tmp_path / "local")
        words = ["compare", str(grid), "--backend", "ray", "--address", address, "--out", str(tmp_path / "ray")]
        subprocess.run([sys.executable, "-m", "rlsafe", *words], env=environment, check=True, timeout=900)
        assert same(tmp_path / "local", tmp_path / "ray")
    finally:
        process.terminate()
        process.wait(120)  # it drains its node first
        shutil.rmtree(place, ignore_errors=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--backend", "rya"], "expected local or ray; did you mean 'ray'"),
        (["--cell-gpus", "0.5"], "--cell-gpus: needs --backend ray"),
        (["--backend", "ray", "--cell-cpus", "1.5"], "--cell-cpus 1.5: expected a fraction up to 1, or a whole number"),
        (["--backend", "ray", "--address", "127.0.0.1:1"], "--address 127.0.0.1:1: no Ray cluster answers there"),
        (["--backend", "ray", "--cell-gpus", "4000"], "a cell takes 1 CPUs and 4000 GPUs"),
    ],
)
def test_what_cannot_run_is_one_clear_line(grid, tmp_path, capsys, options, words):
    with pytest.raises(SystemExit) as stopped:
        main(["compare", str(grid), "--out", str(tmp_path / "out"), *options])
    assert stopped.value.code == 2 and words in capsys.readouterr().err
