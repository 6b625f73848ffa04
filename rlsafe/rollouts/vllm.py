"""Rollouts by vLLM inside this process: one engine, taken over by one policy after another."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from rlsafe.config import UserError
from rlsafe.policy.taps import check_vector, decoder_blocks
from rlsafe.rollouts.quiet import quiet
from rlsafe.rollouts.sampling import stop_token_ids
from rlsafe.types import Completion, PolicyWeights, Request, SamplingParams

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives here: hooks and in-memory weights reach it
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # apply_model with a function of ours; nothing leaves the process
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
}
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
CPU_PREFILL = 8192  # prompt tokens of one prefill step
CPU_KV_BYTES = 1 << 30
USE_TRANSFORMERS = "; set sampler.kind=transformers"


def generation_threads(parameters: int) -> int:
    """CPU threads for generation: one per 4 M parameters. Small models spend their time between kernels, where more threads
    only wait for each other (measured: 1 M parameters, 7,000 tokens/s with one thread, 250 with four on a busy machine)."""
    return max(1, min(os.cpu_count() or 1, parameters // 4_000_000))


class VLLMSampler:
    """A colocated vLLM engine. `sync` makes it exactly the given policy, whatever it was before.

    sync "merged": W + scale * B A computed fresh and loaded over the old weights; "adapter": LoRA hot-swap under a new id.
    """

    name = "vllm"

    def __init__(
        self,
        model_dir: str,
        *,
        dtype: str = "float32",
        sync: Literal["merged", "adapter"] = "merged",
        lora_rank: int | None = None,
        gpu_memory: float = 0.4,
        max_model_len: int | None = None,
        max_num_seqs: int = 256,
        tokenizer: Any = None,
        eager: bool = True,
        trust_remote_code: bool = False,
        seed: int = 0,
    ):
        """Start the engine (seconds). UserError when vLLM is missing or cannot run the model. `eager=False` (CUDA graphs) is
        faster on a GPU but cannot be steered."""
        self.model_dir, self._sync, self._eager = model_dir, sync, eager
        self._stop = stop_token_ids(model_dir, tokenizer)
        self._hooks: list[Any] = []
        self._loaded: set[str] = set()
        self._adapter: Any = None
        self._adapters = 0
        settings: dict[str, Any] = {
            "model": model_dir,
            "dtype": dtype,
            "enforce_eager": eager,
            "logprobs_mode": "processed_logprobs",
            "generation_config": "vllm",  # no sampling defaults from the model's directory
            "skip_tokenizer_init": True,  # token ids in, token ids out
            "max_num_seqs": max_num_seqs,
            "trust_remote_code": trust_remote_code,
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
            "seed": seed,
        }
        if sync == "adapter":
            rank = next((r for r in LORA_RANKS if r >= (lora_rank or 1)), None)
            if rank is None:
                raise UserError(
                    f"sampler.sync: vLLM takes adapters up to rank {LORA_RANKS[-1]}, got {lora_rank}; use merged"
                )
            settings |= {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1, "max_cpu_loras": 1}
        self._llm = self._start(settings, max_model_len, gpu_memory)
        models: list[nn.Module] = []
        self._llm.apply_model(models.append)
        self._model = models[0]
        self._threads = generation_threads(sum(p.numel() for p in self._model.parameters()))

    def _start(self, settings: dict[str, Any], max_model_len: int | None, gpu_memory: float) -> Any:
        for key, value in ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        try:
            with quiet():
                import vllm
        except Exception as error:  # a half-installed vLLM fails with more than ImportError
            raise UserError(f"sampler.kind: vLLM does not import ({_line(error)}){USE_TRANSFORMERS}") from None
        self.max_model_len = max_model_len or _default_length(settings["model"])
        settings["max_model_len"] = self.max_model_len
        if torch.cuda.is_available():
            settings["gpu_memory_utilization"] = gpu_memory
        else:
            # vLLM 0.31 on CPU crashes when it splits a seeded request's prompt ("CPU Generator does not use offset").
            settings |= {
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(self.max_model_len, CPU_PREFILL),
            }
            settings["kv_cache_memory_bytes"] = CPU_KV_BYTES
            settings["block_size"] = (
                32  # the smallest: prompts as short as this share their prefix (1.5x tokens/s in groups)
            )
        set_threads, threads = torch.set_num_threads, torch.get_num_threads()
        try:
            with quiet(), torch.random.fork_rng(devices=[]):
                return vllm.LLM(**settings)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"sampler.kind: vLLM cannot run {settings['model']}: {_line(error)}{USE_TRANSFORMERS}"
            ) from None
        finally:
            torch.set_num_threads = set_threads  # vLLM replaces it on CPU, and lowers the count
            torch.set_num_threads(threads)

    @contextmanager
    def _own_threads(self) -> Iterator[None]:
        threads = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            # vLLM draws noise from torch's global generator, and torch.compile would cost its first call 3 to 20 s.
            with torch.random.fork_rng(devices=[]), _compile_off():
                yield
        finally:
            torch.set_num_threads(threads)

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Completion]:
        """One completion per request, in order. Requests that run together share batches, so a float may differ in its last
        bits when the batch is composed differently."""
        import vllm

        if not requests:
            return []
        longest = max(len(r.prompt_ids) for r in requests)
        if longest + params.max_tokens > self.max_model_len:
            raise UserError(
                f"sampler.max_model_len: a prompt of {longest} tokens + max_tokens {params.max_tokens} exceeds {self.max_model_len}"
            )
        if not all(r.prompt_ids for r in requests):
            raise UserError("a prompt is empty: it has no tokens to start from")
        settings = [
            vllm.SamplingParams(
                temperature=params.temperature, top_p=params.top_p, max_tokens=params.max_tokens, seed=r.seed,
                stop_token_ids=self._stop, logprobs=0, detokenize=False, skip_clone=True,
                output_kind=vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
            )
            for r in requests
        ]  # fmt: skip
        prompts = [{"prompt_token_ids": list(r.prompt_ids)} for r in requests]
        with self._own_threads():
            outputs = self._llm.generate(prompts, settings, use_tqdm=False, lora_request=self._adapter)
        return [_completion(o.outputs[0]) for o in outputs]

    # ------------------------------------------------------------------------------------------------- weights

    def sync(self, policy: PolicyWeights) -> None:
        """Become `policy`: its merged weights over the base ones, or its adapter; then drop the prefix cache."""
        if self._sync == "adapter":
            self._swap_adapter(policy)
        else:
            changed = dict(policy.merged_weights())
            with self._own_threads():
                self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": self._all_weights(changed)})
        self._drop_caches()

    def _all_weights(self, changed: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the checkpoint, the changed ones replaced. All of them, because vLLM fuses projections and loads a
        fused tensor only as a whole, and because the policy before this one may have changed others."""
        for name, tensor in _checkpoint(self.model_dir):
            yield name, changed.pop(name, tensor)
        yield from changed.items()

    def _swap_adapter(self, policy: PolicyWeights) -> None:
        from vllm.lora.request import LoRARequest

        with tempfile.TemporaryDirectory(prefix="rlsafe-adapter-") as directory:
            policy.save_adapter(directory)
            if self._adapter is not None:
                self._llm.llm_engine.remove_lora(self._adapter.lora_int_id)
            self._adapters += 1
            self._adapter = LoRARequest(f"policy-{self._adapters}", self._adapters, directory)
            self._llm.llm_engine.add_lora(self._adapter)

    def _drop_caches(self) -> None:
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache")

    # ------------------------------------------------------------------------------------------------ steering

    def steer(self, additions: Mapping[int, Tensor] | None) -> None:
        """Add vectors [H] to the residual stream at all positions from now on; None removes them."""
        additions = additions or {}
        if additions and not self._eager:
            raise UserError("this vLLM engine runs CUDA graphs and cannot be steered; expected an eager one")
        config = self._llm.model_config.hf_text_config
        for layer, vector in additions.items():
            check_vector(vector, layer, config.hidden_size, config.num_hidden_layers)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        blocks = decoder_blocks(self._model, config.num_hidden_layers, self.model_dir) if additions else []
        for layer, vector in additions.items():
            self._hooks.append(_steer_block(blocks, layer, vector.detach().clone()))
        self._drop_caches()

    def close(self) -> None:
        """Shut the engine down and free its memory."""
        self.steer(None)
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm, self._model


def _steer_block(blocks: Any, layer: int, vector: Tensor) -> Any:
    """vLLM's blocks take (positions, hidden [N, H], residual) and give (hidden, residual) whose sum is the residual stream, so
    adding to `hidden` adds to the stream."""

    def after(_: nn.Module, __: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = hidden + vector.to(hidden)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if "hidden_states" in kwargs:
            hidden = kwargs["hidden_states"]
            return args, kwargs | {"hidden_states": hidden + vector.to(hidden)}
        return (args[0], args[1] + vector.to(args[1]), *args[2:]), kwargs

    if layer == 0:
        return blocks[0].register_forward_pre_hook(before, with_kwargs=True)
    return blocks[layer - 1].register_forward_hook(after)


def _completion(output: Any) -> Completion:
    ids = list(output.token_ids)
    logprobs = [position[i].logprob for i, position in zip(ids, output.logprobs, strict=True)]
    return Completion(ids, logprobs, "stop" if output.finish_reason == "stop" else "length")


def _checkpoint(model_dir: str) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    files = sorted(p for p in Path(model_dir).glob("*.safetensors") if not p.name.startswith("adapter"))
    if not files:
        raise UserError(f"{model_dir}: no .safetensors weights to sync from{USE_TRANSFORMERS}")
    for file in files:
        with safe_open(str(file), framework="pt") as tensors:
            for name in tensors.keys():
                yield name, tensors.get_tensor(name)


def _default_length(model_dir: str) -> int:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model_dir).get_text_config()
    return min(4096, int(getattr(config, "max_position_embeddings", 4096)))


def _compile_off() -> Any:
    return torch.compiler.set_stance("force_eager")


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return cast(str, (lines or [type(error).__name__])[0])[:300]
