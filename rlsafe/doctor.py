"""Checks of the installation: packages, samplers, devices, and how to fix what does not work.

`rlsafe doctor` prints the table; `python -m rlsafe.doctor --selftest` is the check at the end of scripts/setup.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import shutil
import sys
import tempfile
import traceback
from dataclasses import asdict, dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rlsafe.features import features

if TYPE_CHECKING:
    from rich.table import Table

REQUIRED = (
    *("torch", "transformers", "peft", "accelerate", "trl", "datasets", "tokenizers", "safetensors", "numpy", "scipy"),
    *("pydantic", "yaml", "jinja2", "matplotlib", "tensorboard", "openai", "bandit"),
)

MIN_MEMORY_GB = 4.0  # one vLLM engine on CPU, the policy and the judge of the organism comparison
MIN_GPU_GB = 40  # the 7B recipes with vLLM on the same card, by the estimate of their dry runs
VLLM_SHARE = 0.4  # of a GPU, the default of sampler.gpu_memory
TRIED = 0.1  # share of the GPU that one token is tried with
MIN_DISK_GB = 2.0  # adapters, checkpoints and metrics of one comparison


@dataclass(frozen=True)
class Check:
    """One line of the table. `failed` means that the main job cannot run, `missing` that an optional feature does not work;
    `fix` says what to do, in one line."""

    name: str
    status: Literal["ok", "note", "failed", "works", "missing"]
    found: str
    fix: str = ""


def doctor(selftest: bool = False) -> list[Check]:
    """Look at this machine. `selftest` also generates one token through vLLM with a tiny model made on the spot."""
    features_here = optional()  # before vLLM gets its environment, which says that the hub is not to be asked
    checks = [_python(), _packages(), _device(), _vllm(), _organism(), _memory(), _disk()]
    return [*checks, *([_one_token()] if selftest else []), *features_here]


def optional() -> list[Check]:
    """The optional features; the main job runs without any of them."""
    try:
        found = features()
    except Exception as error:  # a broken package raises anything; the check of the packages says what to do about it
        return [Check("optional features", "missing", _one_line(error))]
    return [Check(one.name, "missing" if one.lacks else "works", one.found, one.lacks) for one in found]


def installation() -> list[Check]:
    """The check at the end of scripts/setup: imports, and one token through vLLM."""
    return [_python(), _packages(), _vllm(), _one_token()]


def healthy(checks: list[Check]) -> bool:
    """True when the main job (the organism comparison) can run."""
    return all(check.status != "failed" for check in checks)


def table(checks: list[Check]) -> Table:
    """The checks as a table, each with its fix below what was found."""
    from rich.table import Table
    from rich.text import Text

    colours = {"ok": "green", "works": "green", "note": "yellow", "missing": "yellow", "failed": "red"}
    shown = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for check in checks:
        found = Text(check.found)
        if check.fix:
            found.append(f"{chr(10) if check.found else ''}-> {check.fix}", style="bold")
        shown.add_row(check.name, Text(check.status, style=colours[check.status]), found)
    return shown


def as_json(checks: list[Check]) -> str:
    """The checks for programs: [{"name", "status", "found", "fix"}]."""
    return json.dumps([asdict(check) for check in checks], indent=2)


# ------------------------------------------------------------------------------------------------------- checks


def _python() -> Check:
    here = f"{platform.python_version()} on {platform.system()} {platform.machine()}, {sys.prefix}"
    return Check("python", "ok", here)


def _version(module: str) -> str:
    names = metadata.packages_distributions().get(module, [])
    return f"{names[0]} {metadata.version(names[0])}" if names else module


def _import_error(module: str) -> str:
    """Empty when the module imports, else why not, in one line."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken binary package raises anything: OSError, RuntimeError, AttributeError ...
        return _one_line(error)
    return ""


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _packages() -> Check:
    broken = {module: why for module in REQUIRED if (why := _import_error(module))}
    if broken:
        found = "; ".join(f"{module}: {why}" for module, why in broken.items())
        return Check("packages", "failed", found, "run scripts/setup (it installs the tested set)")
    return Check("packages", "ok", ", ".join(_version(module) for module in REQUIRED[:6]))


def _device() -> Check:
    if why := _import_error("torch"):
        return Check("device", "failed", f"torch does not import: {why}", "run scripts/setup")
    import torch

    threads = f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} torch threads"
    if torch.cuda.is_available():
        cards = [(torch.cuda.get_device_name(i), *torch.cuda.mem_get_info(i)) for i in range(torch.cuda.device_count())]
        shown = "; ".join(f"{name}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free" for name, free, total in cards)
        found = f"{shown}; {threads}"
        if lacking := _small(min(total for *_, total in cards) / 2**30) or _busy(cards):
            return Check("device", "note", found, lacking)
        return Check("device", "ok", found)
    if shutil.which("nvidia-smi") and torch.version.cuda is None:
        fix = "if nvidia-smi lists a GPU, run scripts/setup again for the GPU set"
        return Check("device", "note", f"{threads}; nvidia-smi is here but torch is a CPU build", fix)
    if unused := _unused_gpu():
        return Check(
            "device",
            "note",
            f"{threads}; {unused}",
            "update the driver (CUDA 13 needs 580 or newer), then scripts/setup",
        )
    return Check("device", "ok", f"{threads}; no GPU: the organism runs well, real models need one")


def _small(total: float) -> str:
    """What is known not to fit a card of `total` GiB; "" when the shipped 7B recipes do."""
    if total >= MIN_GPU_GB - 1:  # cards show a little less than their name
        return ""
    return (
        f"the 7B recipes want a card of {MIN_GPU_GB} GiB; rlsafe train CONFIG --dry-run says what a run needs (model.quantization, "
        "a smaller model and shards over several cards make it less)"
    )


def _busy(cards: list[tuple[str, int, int]]) -> str:
    """Which of the (name, bytes free, bytes in all) others use so much of that vLLM's usual share is not free; "" when none is."""
    full = [str(i) for i, (_, free, total) in enumerate(cards) if free < VLLM_SHARE * total]
    if not full:
        return ""
    return (
        f"{'GPU' if len(full) == 1 else 'GPUs'} {', '.join(full)}: less than {VLLM_SHARE:.0%} is free, which vLLM takes "
        "(sampler.gpu_memory): see nvidia-smi, or choose cards with CUDA_VISIBLE_DEVICES"
    )


def _unused_gpu() -> str | None:
    """What a run would say about a GPU that it cannot use."""
    try:
        from rlsafe.engine.run.layout import unused_gpu
    except Exception:  # other checks say what is missing or broken
        return None
    return unused_gpu()


def _vllm() -> Check:
    _vllm_environment()
    why = _import_error("vllm")
    if why:
        fix = "run scripts/setup, or use sampler.kind=transformers (slower)"
        return Check("vllm", "failed", f"does not import: {why}", fix)
    from vllm.platforms import current_platform

    return Check("vllm", "ok", f"{_version('vllm')} for {current_platform.device_type or 'an unknown device'}")


def _organism() -> Check:
    assets = resources.files("rlsafe") / "organism" / "assets"
    lacking = [name for name in ("base", "aligned") if not (assets / name / "model.safetensors").is_file()]
    if lacking:
        return Check("organism", "failed", f"no packaged weights of {', '.join(lacking)}", "run scripts/build_organism")
    return Check("organism", "ok", "packaged weights are here")


def _memory() -> Check:
    if why := _import_error("psutil"):
        return Check("memory", "note", f"psutil does not import: {why}", "run scripts/setup")
    import psutil

    memory = psutil.virtual_memory()
    found = f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free"
    if memory.available / 2**30 < MIN_MEMORY_GB:
        return Check("memory", "note", found, f"the organism comparison wants {MIN_MEMORY_GB:.0f} GiB: close something")
    return Check("memory", "ok", found)


def _disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    found = f"{free:.1f} GiB free here"
    if free < MIN_DISK_GB:
        return Check(
            "disk", "note", found, f"a comparison wants {MIN_DISK_GB:.0f} GiB: clear some, or use --out elsewhere"
        )
    return Check("disk", "ok", found)


def _one_token() -> Check:
    try:
        return Check("one token", "ok", f"vLLM generated {generate_one_token()!r} with a tiny random model")
    except Exception as error:  # an engine that cannot start here raises many kinds of errors
        traceback.print_exc()
        found = _one_line(error)
        if _no_room(error):  # nothing that another set-up would mend
            return Check(
                "one token", "note", found, "other processes hold the GPU's memory (nvidia-smi): vLLM was not tried"
            )
        return Check("one token", "failed", found, "the traceback is above; run scripts/setup again")


def _no_room(error: Exception) -> bool:
    """Whether a GPU that others use is all that kept vLLM from starting."""
    if _import_error("torch"):
        return False
    import torch

    if not torch.cuda.is_available():
        return False
    free, total = torch.cuda.mem_get_info()
    return "memory" in str(error).lower() and free < TRIED * total


# ----------------------------------------------------------------------------------------------------- self-test


def _vllm_environment() -> None:
    """Defaults for vLLM's environment variables: in this process, little memory, no usage reports, only errors logged."""
    for name, value in {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }.items():
        os.environ.setdefault(name, value)


def tiny_model(directory: str) -> None:
    """Write a random one-layer Qwen2 with a word-level tokenizer: a whole checkpoint, without a network."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    words = ["<pad>", "<eos>", "<unk>", *(f"word{i}" for i in range(61))]
    words_to_ids = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(words_to_ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=64
    ).save_pretrained(directory)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    Qwen2ForCausalLM(config).save_pretrained(directory)


def generate_one_token() -> str:
    """One token through the vLLM engine, in this process."""
    _vllm_environment()
    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as directory:
        tiny_model(directory)
        engine = LLM(
            model=directory,
            dtype="float32",
            enforce_eager=True,
            max_model_len=64,
            gpu_memory_utilization=TRIED,
            disable_log_stats=True,
        )
        params = SamplingParams(max_tokens=1, min_tokens=1, temperature=0)
        [reply] = engine.generate([{"prompt_token_ids": [3, 4, 5]}], params, use_tqdm=False)
    return reply.outputs[0].text


def main() -> None:
    """Print the checks, one a line; with `--selftest` those of the installation. Exits with 1 when one failed."""
    checks = installation() if "--selftest" in sys.argv[1:] else doctor()
    for check in checks:
        print(f"{check.name}: {check.status}: {check.found}{' -> ' + check.fix if check.fix else ''}")
    sys.exit(0 if healthy(checks) else 1)


if __name__ == "__main__":
    main()
