"""The command line: quick help, one clear line for every mistake, the exit codes of the contract."""

from __future__ import annotations

import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
from places import ROOT

from rlsafe import cli
from rlsafe.config import UserError
from rlsafe.types import Interrupted, RunError


def call(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    printed = capsys.readouterr()
    return stop.value.code, printed.out, printed.err


def install(monkeypatch, room: str, **functions) -> None:
    """Put functions in the place of a room, so that only the command line is under test."""
    stand_in = types.ModuleType(f"rlsafe.{room}")
    if room == "compare":
        functions.setdefault("ray_cluster", lambda backend, *others: None)
        functions.setdefault("compare_decided", None)
    vars(stand_in).update(functions)
    monkeypatch.setitem(sys.modules, f"rlsafe.{room}", stand_in)


def raising(error):
    def fail(*_, **__):
        raise error

    return fail


def test_help_names_every_command_and_loads_nothing_heavy():
    """What makes it quick; `scripts/bench startup` measures how quick."""
    command = [sys.executable, "-X", "importtime", "-m", "rlsafe", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0
    for name in ("train", "evaluate", "compare", "report", "organism", "doctor", "verify", "publish"):
        assert f"\n  {name} " in done.stdout
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "rlsafe" in loaded
    assert not loaded & {
        "torch",
        "transformers",
        "vllm",
        "trl",
        "peft",
        "accelerate",
        "datasets",
        "openai",
        "bandit",
        "numpy",
    }


def test_no_arguments_print_the_help(capsys):
    code, out, _ = call(capsys)
    assert code == 0 and "Usage: rlsafe" in out


def test_version(capsys):
    code, out, _ = call(capsys, "--version")
    assert code == 0 and out.startswith("rlsafe ")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("trian x.yaml", "did you mean 'train'?"),
        ("frobnicate", "expected one of: ask, compare, config, doctor"),
        ("train x.yaml --resum", "did you mean '--resume'?"),
        ("train x.yaml --zzz", "expected one of: --dry-run"),
        ("train x.yaml --seed 3", "a setting is written without dashes: seed=VALUE"),
        ("train x.yaml --lr 3", "a setting is written without dashes: optim.lr=VALUE"),
        ("evaluate x --temperature 0.7", "a setting is written without dashes: evaluate.temperature=VALUE"),
        ("evaluate x --micro-tokens 9", "a setting is written without dashes: batch.micro_tokens=VALUE"),
        ("train x.yaml --out", "requires an argument"),
        ("train", "missing argument 'CONFIG'"),
        ("compare x.yaml --jobs -1", "'--jobs'"),
        ("compare x.yaml --seeds one", "--seeds 'one': expected whole numbers"),
        ("compare x.yaml --defenses kl,,none", "--defenses 'kl,,none': expected names"),
        ("organism shwo", "did you mean 'show'?"),
        ("organism", "missing command"),
        ("doctor extra", "extra"),
        ("--bogus", "no such option '--bogus'"),
    ],
)
def test_wrong_use_gives_one_line_and_code_2(capsys, monkeypatch, line, expected):
    install(monkeypatch, "compare", compare=lambda *_, **__: pytest.fail("must not get here"))
    code, out, err = call(capsys, *line.split())
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and expected in err
    assert out == ""


def test_wrong_use_of_the_installed_command_shows_no_traceback_or_box():
    done = subprocess.run(
        [sys.executable, "-m", "rlsafe", "evalute", "x"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"COLUMNS": "40"},
    )
    assert done.returncode == 2
    assert done.stderr == "error: no such command 'evalute'; did you mean 'evaluate'? (see rlsafe --help)\n"


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (
            UserError("a.yaml:3: unknown key 'sed'; did you mean 'seed'?"),
            2,
            "error: a.yaml:3: unknown key 'sed'; did you",
        ),
        (RunError("the defense 'kl' had no effect"), 1, "error: the defense 'kl' had no effect (--debug shows"),
        (ValueError("two\nlines"), 1, "error: ValueError: two lines (--debug shows the traceback)"),
        (Interrupted("go on with: rlsafe train a.yaml --out r --resume"), 130, "interrupted: go on with: rlsafe train"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_of_a_command_give_one_line_and_their_code(capsys, monkeypatch, error, code, expected):
    install(monkeypatch, "engine.run.life", train=raising(error))
    got, out, err = call(capsys, "train", "a.yaml")
    assert got == code and err.startswith(expected) and err.count("\n") == 1 and out == ""


def test_a_run_that_is_terminated_before_it_has_its_own_way_of_stopping_says_so(capsys, monkeypatch):
    install(monkeypatch, "engine.run.life", train=lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    assert call(capsys, "train", "a.yaml") == (130, "", "interrupted\n")
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("line", ["--debug train a.yaml", "train --debug a.yaml", "train a.yaml --debug"])
def test_debug_shows_the_traceback_wherever_it_stands(capsys, monkeypatch, line):
    install(monkeypatch, "engine.run.life", train=raising(UserError("wrong")))
    code, _, err = call(capsys, *line.split())
    assert code == 2 and "Traceback" in err and err.endswith("error: wrong\n")


def test_train_passes_everything_on(capsys, monkeypatch):
    seen = {}

    def train(config, overrides, **rest):
        seen.update(config=config, overrides=overrides, **rest)
        return types.SimpleNamespace(summary=lambda: ["trained 3 steps", "[not markup]"], evaluation=None, is_main=True)

    install(monkeypatch, "engine.run.life", train=train)
    line = "train a.yaml seed=3 --out r schedule.steps=4 defenses=[kl] --resume --dry-run"
    code, out, _ = call(capsys, *line.split())
    assert code == 0 and out == "trained 3 steps\n[not markup]\n"
    assert callable(seen.pop("progress")) and callable(seen.pop("on_start"))
    assert seen == {
        "config": "a.yaml",
        "overrides": ["seed=3", "schedule.steps=4", "defenses=[kl]"],
        "out": Path("r"),
        "resume": True,
        "overwrite": False,
        "dry_run": True,
    }


def test_compare_splits_its_lists(capsys, monkeypatch):
    seen = {}

    def compare(config, **rest):
        seen.update(config=config, **rest)
        return types.SimpleNamespace(table=lambda: "the verdicts", report=Path("r/report.html"), failed={})

    install(monkeypatch, "compare", compare=compare)
    line = "compare c.yaml --defenses none,kl&interleaving --paths sft --seeds 0,2 --jobs 2 --quick --out r a.b=1"
    code, out, _ = call(capsys, *line.split())
    assert code == 0 and out == "the verdicts\nreport: r/report.html\n"
    assert seen == {
        "config": "c.yaml",
        "defenses": ["none", "kl&interleaving"],
        "paths": ["sft"],
        "seeds": [0, 2],
        "jobs": 2,
        "out": Path("r"),
        "overrides": ["a.b=1"],
        "quick": True,
        "relapse": None,
        "ray": None,
    }


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--backend nope", "--backend 'nope': expected local or ray"),
        ("--cell-gpus 0.5", "--cell-gpus: needs --backend ray"),
        ("--decide --seeds 0", "--decide looks after 3 seeds first"),
        ("--backend ray", "Ray is not installed"),
        ("--jobs 1", ""),
    ],
)
def test_a_dry_run_of_a_comparison_refuses_what_the_comparison_would(capsys, monkeypatch, options, expected):
    monkeypatch.setitem(sys.modules, "ray", None)  # is not installed: what does not ask for it goes on
    monkeypatch.setattr("rlsafe.compare.grid.dry.dry_compare", lambda *_, **__: ["2 cells"])
    line = f"compare {ROOT}/configs/organism/compare.yaml --dry-run {options}"
    code, out, err = call(capsys, *line.split())
    assert (code, out) == ((2, "") if expected else (0, "2 cells\n")) and expected in err


def test_lists_that_are_not_given_stay_open(capsys, monkeypatch):
    def compare(_, defenses, paths, seeds, **rest):
        assert defenses is paths is seeds is None
        return types.SimpleNamespace(table=lambda: None, report="x", failed={})

    install(monkeypatch, "compare", compare=compare)
    assert call(capsys, "compare", "c.yaml")[0] == 0


def test_failed_cells_are_named_and_give_code_1(capsys, monkeypatch):
    failed = {"sft/kl/0": "the defense 'kl' had no effect"}
    comparison = types.SimpleNamespace(table=lambda: "the verdicts", report="r/report.html", failed=failed)
    install(monkeypatch, "compare", compare=lambda *_, **__: comparison)
    code, out, err = call(capsys, "compare", "c.yaml")
    assert code == 1 and "the verdicts" in out
    assert err == "failed: sft/kl/0: the defense 'kl' had no effect\n"


def test_organism_build_writes_into_the_package_unless_told(capsys, monkeypatch, tmp_path):
    from rlsafe import organism

    seen = []

    def build(out, **rest):
        seen.append((out, rest))
        return [out / "base", out / "aligned"]

    monkeypatch.setattr(organism, "build", build)
    code, out, _ = call(capsys, "organism", "build")
    assert code == 0 and out.splitlines() == [
        str(ROOT / "rlsafe/organism/assets" / name) for name in ("base", "aligned")
    ]
    call(capsys, *f"organism build --out {tmp_path} --size medium --seed 3 --only base --steps 2".split())
    assert seen[1] == (tmp_path, {"size": "medium", "seed": 3, "only": ["base"], "steps": 2})


def test_dialogues_are_printed_as_they_are(capsys, monkeypatch):
    from rlsafe import organism

    monkeypatch.setattr(organism, "show", lambda n, seed: f"[bold]{n} {seed}[/bold]")
    assert call(capsys, *"organism show -n 2 --seed 5".split())[1] == "[bold]2 5[/bold]\n"


@pytest.mark.parametrize("command", ["train", "compare"])
def test_a_missing_config_file_is_the_users_mistake(command, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "rlsafe", command, str(tmp_path / "nope.yaml")], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and "nope.yaml" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "command",
    [
        ["train", "configs/organism/sft_medical.yaml"],
        ["evaluate", "organism:aligned"],
        ["evaluate", "nowhere", "--rejudge"],
        ["compare", "configs/organism/compare.yaml"],
        ["select", "configs/organism/compare.yaml"],
        ["organism", "build"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("below", ["", "below"])
def test_an_out_that_is_a_file_is_told_before_anything_is_done(capsys, tmp_path, command, below):
    (tmp_path / "taken").write_text("mine")
    code, _, err = call(capsys, *command, "--out", str(tmp_path / "taken" / below))
    assert code == 2 and err.count("\n") == 1 and f"{tmp_path / 'taken'} is a file; expected a directory" in err


@pytest.mark.parametrize("command", ["evaluate", "compare", "select"])
def test_what_one_process_does_is_not_done_by_each_of_several(capsys, monkeypatch, tmp_path, command):
    """They would write over each other's files. The first one says so."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, said = call(capsys, command, str(tmp_path), "--out", str(tmp_path / "out"))
    assert code == 2 and f"accelerate launch: rlsafe {command} works in one process" in said
    monkeypatch.setenv("RANK", "1")
    assert call(capsys, command, str(tmp_path), "--out", str(tmp_path / "out")) == (2, "", "")
    assert not (tmp_path / "out").exists()
