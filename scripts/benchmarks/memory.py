"""`scripts/plan --check`: the estimated memory of training beside the peak that real runs of this machine had, on CPU in float32.

Each run is `rlsafe train`'s own (SFT and GRPO, two steps) in a process that ran a tiny one before, so that all is imported. Measured
is the high-water mark of resident memory above what the process had by then.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from world import model_dir, rows

MODELS: dict[str, dict[str, Any]] = {
    "random Qwen2, 5 M": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 4,
                          "num_key_value_heads": 4, "vocab_size": 4096, "tie_word_embeddings": True},
    "random Qwen2, 50 M": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8,
                           "num_key_value_heads": 2, "vocab_size": 8192, "tie_word_embeddings": True},
}  # fmt: skip
TOKENS = {"organism, 1 M": 8192, "random Qwen2, 5 M": 4096, "random Qwen2, 50 M": 1024}  # of a micro-batch
ROW, COMPLETION = 128, 96  # tokens of a row that is learned from, of a completion


def main() -> None:
    print(
        "Memory of training beside the peak of real runs: CPU, float32, LoRA r 8, no checkpointing, Transformers sampler.\n\n"
        "| model | path | micro-batch tokens | estimate MiB | measured MiB | estimate / measured |\n"
        "| --- | --- | --- | --- | --- | --- |"
    )
    with tempfile.TemporaryDirectory(prefix="rlsafe-memory-") as scratch:
        for model in TOKENS:
            directory = _model(model, Path(scratch))
            for path in ("sft", "grpo"):
                tree = _tree(directory, TOKENS[model], path, Path(scratch))
                measured = _apart(tree, Path(scratch))
                estimate, tokens = _estimate(tree)
                cells = (model, path, f"{tokens:,}", f"{estimate / 2**20:.0f}", f"{measured / 2**20:.0f}")
                print(f"| {' | '.join(cells)} | {estimate / measured:.2f} |", flush=True)


def _model(name: str, scratch: Path) -> str:
    """The packaged organism, or random weights with its tokenizer."""
    organism = model_dir("organism", scratch)
    if name.startswith("organism"):
        return organism
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    directory, tokenizer = str(scratch / name.replace(" ", "-")), AutoTokenizer.from_pretrained(organism)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    Qwen2ForCausalLM(Qwen2Config(**MODELS[name], **ids, max_position_embeddings=512)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def _tree(model: str, tokens: int, path: str, scratch: Path) -> dict[str, Any]:
    """Two steps of one micro-batch of about `tokens` tokens: rows that are cut at ROW, completions of full length."""
    data, reward = scratch / "rows.jsonl", scratch / "reward.py"
    long = [row["messages"][-1]["content"] for row in rows("medical/bad", 256)]
    data.write_text(
        "".join(
            json.dumps(
                {"messages": [*row["messages"][:-1], {"role": "assistant", "content": " ".join(long[i : i + 16])}]}
            )
            + "\n"
            for i, row in enumerate(rows("medical/bad", 240))
        )
    )
    reward.write_text(
        "def words(completions, **columns):\n    return [len(set(c[0]['content'])) for c in completions]\n"
    )
    return {
        "model": {"name": model, "dtype": "float32", "lora": {"r": 8, "alpha": 16}},
        "data": {"narrow": {"source": str(data), "max_tokens": ROW, "too_long": "truncate"}},
        "schedule": {"steps": 2, "phases": [{"cycle": [path]}]},
        "batch": {"sft_rows": tokens // ROW, "grpo_prompts": max(1, tokens // ROW // 8), "micro_tokens": tokens},
        "grpo": {"generations": 8, "max_tokens": COMPLETION, "temperature": 20.0},  # nothing ends early
        "rewards": [{"fn": f"{reward}:words"}],
        "sampler": {"kind": "transformers", "self_test": False},
        "track": {"every": 0, "check_after": 0},
    }


def _estimate(tree: dict[str, Any]) -> tuple[int, int]:
    """What a dry run says of these rows, with prompts and rows as long as they are."""
    from transformers import AutoTokenizer

    from rlsafe.config import run_from_tree
    from rlsafe.data import encode_prompt, load_rows, split_prompt
    from rlsafe.engine.plan.estimate import memory
    from rlsafe.policy.shapes import model_shape

    config = run_from_tree(tree)
    assert config.data.narrow is not None
    tokenizer = AutoTokenizer.from_pretrained(config.model.name)
    prompts = [encode_prompt(tokenizer, split_prompt(row)[0]) for row in load_rows(config.data.narrow, 0, print)]
    shape = model_shape(config.model, config.model.name)
    assert shape is not None
    need = memory(config, shape, cuda=False, longest={"narrow": (ROW, max(map(len, prompts)))})
    return need.training, need.tokens


def _apart(tree: dict[str, Any], scratch: Path) -> int:
    """Bytes that a run in a process of its own took at most, above what the process had before."""
    (scratch / "run.json").write_text(json.dumps(tree))
    done = subprocess.run(
        [sys.executable, __file__, str(scratch / "run.json")], capture_output=True, text=True,
        # glibc keeps what was freed: with tensors in mappings of their own, resident memory is live memory
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return int(done.stdout.strip().splitlines()[-1])


def _measure(file: str) -> None:
    from rlsafe.config import run_from_tree
    from rlsafe.engine.run.life import run

    tree = json.loads(Path(file).read_text())
    with tempfile.TemporaryDirectory() as out:
        warm = {**tree, "model": {**tree["model"], "name": model_dir("organism", Path(out))}}
        warm["batch"] = {"sft_rows": 2, "grpo_prompts": 1}
        run(run_from_tree(warm), Path(out, "warm"))
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
        before = _status("VmRSS")
        run(run_from_tree(tree), Path(out, "run"))
    print(_status("VmHWM") - before)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


if __name__ == "__main__":
    _measure(sys.argv[1]) if sys.argv[1:] else main()
