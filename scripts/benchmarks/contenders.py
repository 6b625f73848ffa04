"""The contenders: rlsafe's own loop, TRL's trainers, and a plain step (generation, forward, backward). Each calls its clock after every
step."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import world
from race import Clock


def rlsafe_run(
    clock: Clock, *, tree: dict[str, Any], rows: list[dict[str, Any]], block: int = 1,
    completions: int = world.PROMPTS * world.GROUP,
) -> None:  # fmt: skip
    """The real engine; a unit is `block` steps. GRPO steps (`completions` each) with vLLM in process also report the seconds of
    weight sync and generation."""
    import rlsafe.rollouts.vllm as vllm_room
    from rlsafe.config import RunConfig
    from rlsafe.engine.run.life import run

    spent = {"sync": 0.0, "generate": 0.0}
    for name in spent:
        setattr(vllm_room.VLLMSampler, name, _timed(getattr(vllm_room.VLLMSampler, name), spent, name))
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch, "rows.jsonl")
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        config = RunConfig.model_validate(tree | {"data": {"narrow": {"source": str(data)}}})
        tokens: list[float] = []

        def stepped(done: int, steps: int, record: dict[str, Any]) -> None:
            grpo = "completion_length" in record
            tokens.append(record["completion_length"] * completions if grpo else record["tokens"])
            if done % block == 0:
                taken = dict(spent)
                spent.update(dict.fromkeys(spent, 0.0))
                clock(tokens=sum(tokens), **taken)
                tokens.clear()

        run(config, Path(scratch, "run"), progress=stepped)


def _timed(function: Any, spent: dict[str, float], name: str) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[name] += time.perf_counter() - began

    return call


def grpo_plain(
    clock: Clock, *, model: str, rows: list[dict[str, Any]], max_tokens: int, seeded: bool = True, hastened: bool = True
) -> None:
    """Generation by the same engine and one forward and backward of the same tokens, with nothing else: no rewards, no
    optimizer, no weight sync, no records. seeded=False: without a seed of its own for each request. hastened=False: seeded noise
    as vLLM draws it on a CPU.

    No floor: all rows are padded to the longest in one micro-batch, and their logits exist at once, so that less work is possible."""
    import torch
    import vllm
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rlsafe.rollouts.engine import start_engine
    from rlsafe.rollouts.noise import hasten

    engine, _ = start_engine(
        {
            "model": model, "dtype": "float32", "enforce_eager": True, "logprobs_mode": "processed_logprobs",
            "skip_tokenizer_init": True, "max_num_seqs": 256, "trust_remote_code": False, "disable_log_stats": True,
        },
        None, 0.4,
    )  # fmt: skip
    if hastened:
        engine.collective_rpc(hasten)
    tokenizer = AutoTokenizer.from_pretrained(model)
    policy = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        LoraConfig(r=world.LORA["r"], lora_alpha=world.LORA["alpha"], target_modules="all-linear"),
    )
    decoder, head = policy.get_base_model().model, policy.get_base_model().lm_head
    prompts = [
        tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, return_dict=False)
        for row in rows
    ]
    step = 0
    torch.compiler.set_stance("force_eager").__enter__()
    while True:
        start = step * world.PROMPTS
        asked = [prompts[(start + i) % len(prompts)] for i in range(world.PROMPTS) for _ in range(world.GROUP)]
        settings = [
            vllm.SamplingParams(
                max_tokens=max_tokens, seed=step * 1000 + i if seeded else None, logprobs=0, detokenize=False,
                stop_token_ids=[tokenizer.eos_token_id], output_kind=vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
            )
            for i in range(len(asked))
        ]  # fmt: skip
        outputs = engine.generate([{"prompt_token_ids": ids} for ids in asked], settings, use_tqdm=False)
        completions = [list(output.outputs[0].token_ids) for output in outputs]
        width = max(len(p) + len(c) for p, c in zip(asked, completions, strict=True))
        ids = torch.full((len(asked), width), tokenizer.pad_token_id)
        targets = torch.zeros(ids.shape, dtype=torch.bool)
        for i, (prompt, completion) in enumerate(zip(asked, completions, strict=True)):
            ids[i, : len(prompt) + len(completion)] = torch.tensor(prompt + completion)
            targets[i, len(prompt) : len(prompt) + len(completion)] = True
        hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state
        logits = head(hidden[:, :-1][targets[:, 1:]])
        torch.nn.functional.cross_entropy(logits, ids[targets]).backward()
        policy.zero_grad()
        step += 1
        clock(tokens=float(targets.sum()))


def trl_grpo(clock: Clock, *, model: str, rows: list[dict[str, Any]], max_tokens: int) -> None:
    """TRL's GRPOTrainer with colocated vLLM: the same model, adapter, rows, batch, reward, dtype and engine settings.

    Two settings make its work equal: no importance-sampling correction (on by default, it costs one more forward) and no
    gradient checkpointing. TRL writes weights into vLLM's parameters, which vLLM has packed away on CPU, so that raises; the same
    tensors go through vLLM's reload_weights instead.
    """
    import os

    import torch
    import trl.generation.vllm_generation as generation
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from rlsafe.rollouts.engine import ENVIRONMENT
    from rlsafe.rollouts.quiet import quiet
    from rlsafe.rollouts.vllm import _repack_tied_head

    os.environ |= ENVIRONMENT
    original = generation.LLM

    def engine(**settings: Any) -> Any:
        set_threads, threads = torch.set_num_threads, torch.get_num_threads()
        same = {"dtype": "float32", "enforce_eager": True, "enable_chunked_prefill": False, "block_size": 32}
        with quiet():
            made = original(**settings | same | {"kv_cache_memory_bytes": 256 << 20, "disable_log_stats": True})
        torch.set_num_threads = set_threads
        torch.set_num_threads(threads)
        return made

    def sync(self: Any) -> None:
        weights = ((name, tensor.clone()) for name, tensor in self._iter_named_params())
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self.llm.apply_model(_repack_tied_head)
        self.llm.reset_prefix_cache()

    generation.LLM = engine
    generation.VLLMGeneration.sync_weights = sync
    counted = {"tokens": 0.0}

    def reward(prompts: Any, completions: Any, completion_ids: Any = None, **columns: Any) -> list[float]:
        counted["tokens"] = float(sum(map(len, completion_ids)))
        return world.distinct_words(prompts, completions)

    class Each(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock(tokens=counted["tokens"])

    with tempfile.TemporaryDirectory() as scratch:
        settings = GRPOConfig(
            output_dir=scratch, use_cpu=True, bf16=False, fp16=False, gradient_checkpointing=False, report_to="none",
            save_strategy="no", logging_steps=10**6, disable_tqdm=True, max_steps=100_000, learning_rate=world.LR,
            lr_scheduler_type="constant", per_device_train_batch_size=world.PROMPTS * world.GROUP, num_generations=world.GROUP,
            max_completion_length=max_tokens, temperature=1.0, beta=0.0, use_vllm=True, vllm_mode="colocate",
            vllm_max_model_length=512, vllm_importance_sampling_correction=False, model_init_kwargs={"dtype": "float32"},
        )  # fmt: skip
        trainer = GRPOTrainer(
            model, reward_funcs=reward, args=settings, processing_class=AutoTokenizer.from_pretrained(model),
            train_dataset=Dataset.from_list([{"prompt": row["messages"][:-1]} for row in rows]), callbacks=[Each()],
            peft_config=LoraConfig(r=world.LORA["r"], lora_alpha=world.LORA["alpha"], target_modules="all-linear"),
        )  # fmt: skip
        with torch.compiler.set_stance("force_eager"):
            trainer.train()


def trl_sft(
    clock: Clock, *, model: str, rows: list[dict[str, Any]], batch: int, dtype: str = "float32",
    lora: dict[str, Any] = world.LORA, **settings: Any,
) -> None:  # fmt: skip
    """TRL's SFTTrainer with its defaults but for `settings`; the loss is on the answers, as in rlsafe."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    seen = {"tokens": 0.0}

    class Counting(SFTTrainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            mask = inputs.get("attention_mask")
            seen["tokens"] = float(inputs["input_ids"].numel() if mask is None else mask.sum())
            return super().training_step(model, inputs, *args, **kwargs)

    class Each(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock(tokens=seen["tokens"])

    split = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in rows]
    with tempfile.TemporaryDirectory() as scratch:
        config = SFTConfig(
            output_dir=scratch, use_cpu=True, bf16=False, report_to="none", save_strategy="no", logging_steps=10**6,
            disable_tqdm=True, max_steps=100_000, learning_rate=world.LR, lr_scheduler_type="constant",
            per_device_train_batch_size=batch, model_init_kwargs={"dtype": dtype}, **settings,
        )  # fmt: skip
        trainer = Counting(
            model, args=config, processing_class=AutoTokenizer.from_pretrained(model), callbacks=[Each()],
            train_dataset=Dataset.from_list(split),
            peft_config=LoraConfig(r=lora["r"], lora_alpha=lora["alpha"], use_rslora=lora["rslora"], target_modules="all-linear"),
        )  # fmt: skip
        assert torch.get_num_threads() > 0
        trainer.train()
