"""`rlsafe doctor` says what works and what to do about the rest."""

from __future__ import annotations

import json
import os
import sys
import types

import pytest

from rlsafe import cli, doctor
from rlsafe.doctor import Check


def test_a_broken_package_is_named_with_what_to_do(monkeypatch):
    monkeypatch.setattr(doctor, "REQUIRED", ("json", "rlsafe_no_such_package"))
    check = doctor._packages()
    assert check.status == "failed" and "rlsafe_no_such_package: ModuleNotFoundError" in check.found
    assert "scripts/setup" in check.fix


def test_a_package_that_breaks_on_import_is_found_out(monkeypatch, tmp_path):
    (tmp_path / "rlsafe_broken_binary.py").write_text("raise OSError('libcudart.so: cannot\\nopen')")
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor._import_error("rlsafe_broken_binary") == "OSError: libcudart.so: cannot open"


@pytest.mark.integration  # imports every package that is required
def test_a_working_installation_passes():
    assert [check.status for check in (doctor._python(), doctor._packages(), doctor._device())] == ["ok", "ok", "ok"]
    assert "torch" in doctor._packages().found


@pytest.mark.parametrize(("free", "status"), [(1.0, "note"), (100.0, "ok")])
def test_little_memory_and_disk_are_noted(monkeypatch, free, status):
    import psutil

    size = int(free * 2**30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=size, total=size))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=size))
    assert doctor._memory().status == doctor._disk().status == status


def test_missing_organism_weights_stop_the_main_job(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.resources, "files", lambda _: tmp_path)
    check = doctor._organism()
    assert check.status == "failed" and "aligned" in check.found
    for name in ("base", "aligned"):
        (tmp_path / "organism" / "assets" / name).mkdir(parents=True)
        (tmp_path / "organism" / "assets" / name / "model.safetensors").touch()
    assert doctor._organism().status == "ok"


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("note", 0), ("failed", 1)])
def test_the_exit_code_tells_whether_the_main_job_can_run(monkeypatch, capsys, status, code):
    monkeypatch.setattr(doctor, "doctor", lambda selftest: [Check("device", status, "one [thing]", "do that")])
    with pytest.raises(SystemExit) as stop:
        cli.main(["doctor"])
    out = capsys.readouterr().out
    assert stop.value.code == code
    assert "one [thing]" in out and "-> do that" in out


def test_an_engine_that_cannot_start_is_one_line(monkeypatch):
    def fail():
        raise RuntimeError("no\nsuch device")

    monkeypatch.setattr(doctor, "generate_one_token", fail)
    check = doctor._one_token()
    assert (check.status, check.found) == ("failed", "RuntimeError: no such device")


def test_the_tiny_model_is_a_whole_checkpoint(tmp_path):
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    doctor.tiny_model(str(tmp_path))
    ids = PreTrainedTokenizerFast.from_pretrained(tmp_path)("word0 word1 nowhere")["input_ids"]
    assert ids == [3, 4, 2]
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.vocab_size == 64


def test_module_entry_prints_the_installation_checks(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "installation", lambda: [Check("vllm", "failed", "gone", "put it back")])
    monkeypatch.setattr(sys, "argv", ["doctor", "--selftest"])
    with pytest.raises(SystemExit) as stop:
        doctor.main()
    assert stop.value.code == 1 and capsys.readouterr().out == "vllm: failed: gone -> put it back\n"


# ------------------------------------------------------------------------------------------------ optional features


def test_every_feature_either_works_or_says_what_to_do():
    from rlsafe.features import features

    found = {feature.name: feature for feature in features()}
    assert all(feature.found or feature.lacks for feature in found.values()), "a line that says nothing"
    assert "tensorboard " in found["TensorBoard"].found and not found["TensorBoard"].lacks
    words = " ".join(found)
    for named in (
        "vLLM",
        "hot-swap",
        "GPU",
        "bfloat16",
        "4/8-bit",
        "SDPA",
        "flash",
        "Ray",
        "DeepSpeed",
        "FSDP2",
        "hub",
        "bandit",
    ):
        assert named in words, named


def test_a_feature_whose_package_is_not_here_names_it_and_stops_nothing(monkeypatch):
    from rlsafe import features

    real = features.find_spec
    absent = ("vllm", "ray", "bandit", "bitsandbytes", "flash_attn", "deepspeed")
    monkeypatch.setattr(features, "find_spec", lambda module: None if module in absent else real(module))
    checks = {check.name: check for check in doctor.optional()}
    lacking = [check for check in checks.values() if check.status == "missing"]
    for name, fix in (("vLLM rollouts", "-e '.[vllm]'"), ("grids on Ray (--backend ray)", "-e '.[ray]'"),
                      ("bandit's findings in rewards", "pip install bandit"),
                      ("4/8-bit base (model.quantization)", "pip install bitsandbytes")):  # fmt: skip
        assert checks[name].status == "missing" and fix in checks[name].fix
    assert len(lacking) >= 8 and doctor.healthy(list(checks.values()))


def test_a_hub_token_is_told_from_none_and_never_shown(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for token, status in (("hf_onlyfortestingonlyfortesting", "works"), (None, "missing")):
        monkeypatch.setattr("huggingface_hub.get_token", lambda token=token: token)
        [check] = [check for check in doctor.optional() if "hub" in check.name]
        assert check.status == status and "onlyfortesting" not in str(check)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    [check] = [check for check in doctor.optional() if "hub" in check.name]
    assert check.status == "missing" and "HF_HUB_OFFLINE" in check.fix


def test_a_hub_that_may_be_asked_is_not_called_offline(monkeypatch):
    """Looking at vLLM sets its environment, offline among it, for this process only."""
    monkeypatch.setattr(os, "environ", {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"})
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_onlyfortestingonlyfortesting")
    monkeypatch.setattr(doctor, "REQUIRED", ("json",))
    monkeypatch.setattr(doctor, "_version", lambda name: name)
    monkeypatch.setattr(doctor, "_import_error", lambda module: "" if module != "vllm" else "not looked for here")
    [check] = [check for check in doctor.doctor() if "hub" in check.name]
    assert check.status == "works" and check.fix == ""


@pytest.mark.parametrize("error", [ImportError("No module named 'torch'"), OSError("libcudart.so.13: cannot\nopen")])
def test_a_missing_or_broken_torch_is_said_not_thrown(monkeypatch, error):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "torch":
                raise error

    for name in [name for name in sys.modules if name.partition(".")[0] == "torch"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    monkeypatch.setattr(doctor, "REQUIRED", ("torch",))
    monkeypatch.setattr(doctor, "_vllm", lambda: Check("vllm", "failed", ""))

    def engine():
        raise error

    monkeypatch.setattr(doctor, "generate_one_token", engine)
    checks = {check.name: check for check in doctor.doctor(selftest=True)}
    for name, status in (
        ("packages", "failed"),
        ("device", "failed"),
        ("one token", "failed"),
        ("optional features", "missing"),
    ):
        assert checks[name].status == status and " ".join(str(error).split()) in checks[name].found, name


def test_programs_read_the_checks_as_json(monkeypatch, capsys):
    found = [Check("device", "ok", "one"), Check("Ray", "missing", "", "install [it]")]
    monkeypatch.setattr(doctor, "doctor", lambda selftest: found)
    with pytest.raises(SystemExit) as stop:
        cli.main(["doctor", "--json"])
    read = json.loads(capsys.readouterr().out)
    assert stop.value.code == 0, "a missing feature is no failure"
    assert [Check(**one) for one in read] == found


GIB = 1 << 30


@pytest.fixture
def cards(monkeypatch):
    """Makes this a machine with GPUs of (bytes free, bytes in all)."""
    import torch

    def have(*sizes, native=True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(sizes))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda i=0: f"Card {i}")
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i=0: sizes[i])
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation
        )

    return have


def test_every_card_is_shown_and_the_one_that_others_fill_is_named(cards):
    cards((79 * GIB, 80 * GIB), (3 * GIB, 80 * GIB), (70 * GIB, 80 * GIB))
    check = doctor._device()
    assert "Card 0, 79 of 80 GiB free; Card 1, 3 of 80 GiB free; Card 2" in check.found
    assert check.status == "note" and check.fix.startswith("GPU 1: less than 40% is free")
    cards((79 * GIB, 80 * GIB), (78 * GIB, 80 * GIB))
    assert doctor._device().status == "ok"
    from rlsafe.config import SamplerConfig

    assert SamplerConfig().gpu_memory == doctor.VLLM_SHARE


def test_the_smallest_card_decides_what_fits(cards):
    cards((79 * GIB, 80 * GIB), (23 * GIB, 24 * GIB))
    check = doctor._device()
    assert check.status == "note" and "want a card of 40 GiB" in check.fix


def test_a_gpu_without_bfloat16_is_told_so(cards):
    from rlsafe.features import features

    cards((15 * GIB, 16 * GIB), native=False)
    [found] = [one for one in features() if one.name == "bfloat16"]
    assert "from Ampere on" in found.lacks
    cards((15 * GIB, 16 * GIB))
    [found] = [one for one in features() if one.name == "bfloat16"]
    assert not found.lacks


@pytest.mark.parametrize(("free", "status"), [(1, "note"), (70, "failed")])
def test_a_gpu_that_others_fill_is_no_broken_installation(cards, monkeypatch, free, status):
    """`scripts/setup` ends with this check: it would say that the installation failed, and making it anew would not help."""
    cards((free * GIB, 80 * GIB))

    def full():
        raise ValueError(
            "Free memory on device cuda:0 (1.0/80.0 GiB) on startup is less than desired GPU memory utilization"
        )

    monkeypatch.setattr(doctor, "generate_one_token", full)
    check = doctor._one_token()
    assert check.status == status and doctor.healthy([check]) is (status == "note")


def test_a_card_that_the_recipes_do_not_fit_is_noted_with_what_makes_them_smaller():
    assert doctor._small(141) == "" and doctor._small(doctor.MIN_GPU_GB) == ""
    assert f"want a card of {doctor.MIN_GPU_GB} GiB" in doctor._small(24) and "--dry-run" in doctor._small(24)
