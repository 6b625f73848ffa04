"""Rollouts by vLLM inside this process: one engine, used by one policy after another."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rlsafe.config import UserError
from rlsafe.policy.taps import check_vector, decoder_blocks, steered
from rlsafe.rollouts import ranks
from rlsafe.rollouts.engine import forget, generation_threads, refusal, same_random_state, start_engine, weight_files
from rlsafe.rollouts.noise import hasten
from rlsafe.rollouts.sampling import check_lengths, stop_token_ids
from rlsafe.rollouts.units import IN_BLOCK, Units, checkpoint, whole_units
from rlsafe.types import Completion, PolicyWeights, Request, SamplingParams

SHARED_MEMORY, SHARED_MEMORY_FREE = "/dev/shm", 1 << 30
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the ranks that vLLM makes room for


class VLLMSampler:
    """A colocated vLLM engine. After `sync` it has exactly the given policy's weights, whatever it had before.

    sync "merged": fresh W + scale * B A loaded over the old weights; "adapter": LoRA swapped under a new id.
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
        tensor_parallel: int = 1,
        max_model_len: int | None = None,
        max_num_seqs: int = 256,
        tokenizer: Any = None,
        eager: bool = True,
        trust_remote_code: bool = False,
        seed: int = 0,
    ):
        """Start the engine (seconds). UserError when vLLM is missing or cannot run the model.

        tensor_parallel: neighbouring ranks that share it; all of them then make, sync, steer and ask it together.
        eager=False (CUDA graphs) is faster on a GPU but cannot be steered.
        """
        self.model_dir, self._sync, self._eager, self.closed = model_dir, sync, eager, False
        # What vLLM rounds an adapter to as it reads it: to write more would take longer and give the same
        self._dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(dtype)
        self.stop = stop_token_ids(model_dir, tokenizer)  # of each further policy: `make_sampler`
        self._hooks: list[Any] = []
        self._adapter: Any = None
        self._adapters = 0
        self._files = weight_files(model_dir)
        self._loaded: set[str] = set()  # parts of the model (see `unit_of`) whose weights differ from the checkpoint's
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
            settings |= _lora_settings(lora_rank)
        self._start(settings, tensor_parallel, max_model_len, gpu_memory)
        self._threads = (
            1  # beside a GPU, as vLLM itself has it: more only wait for each other, and differ from what was compiled
        )
        if not torch.cuda.is_available():
            self._llm.collective_rpc(hasten)
            self._threads = generation_threads(sum(file.stat().st_size for file in self._files) // 4)
        self._try(gpu_memory)

    def _start(self, settings: dict[str, Any], parallel: int, max_model_len: int | None, gpu_memory: float) -> None:
        """Start the engine on this rank's device, or on those of `parallel` neighbours."""
        ranks.starting()
        try:
            place = ranks.launcher(parallel)
            self._team = ranks.Team(parallel)
            self._llm, self.max_model_len = start_engine(settings | place, max_model_len, gpu_memory)
        except UserError:
            with ranks.ending():
                pass
            raise
        ranks.lives(self)
        self._model = _model_of(self._llm)

    def _try(self, gpu_memory: float) -> None:
        """Sample one token: kernels that do not support a shape fail now, not in the first step."""
        try:
            self.generate([Request([1], 0)], SamplingParams(max_tokens=1))
        except Exception as error:
            said = refusal(self.model_dir, error, gpu_memory)
            forget(error)
            self.close()
            raise said from None

    @property
    def merges(self) -> bool:
        """Whether whole weights are synced, not an adapter."""
        return self._sync == "merged"

    @contextmanager
    def _own_threads(self) -> Iterator[None]:
        threads = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        # Where nothing was compiled at the start, torch.compile would cost the first call 3 to 20 s.
        compiling = torch.compiler.set_stance("force_eager") if self._eager else nullcontext()
        try:
            with same_random_state(), compiling:
                yield
        finally:
            torch.set_num_threads(threads)

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Completion]:
        """One completion per request, in order. Log-probs may differ in their last bits with batch composition."""
        check_lengths(requests, params, self.max_model_len, "the engine (sampler.max_model_len)")
        if self._team.size > 1:
            return self._team.pooled(requests, lambda pool: self._generate(pool, params))
        return self._generate(requests, params) if requests else []

    def _generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Completion]:
        import vllm

        settings = [
            vllm.SamplingParams(
                temperature=params.temperature, top_p=params.top_p, max_tokens=params.max_tokens, seed=r.seed,
                stop_token_ids=self.stop, logprobs=0, detokenize=False, skip_clone=True,
                output_kind=vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
            )
            for r in requests
        ]  # fmt: skip
        prompts = [{"prompt_token_ids": list(r.prompt_ids)} for r in requests]
        engine = self._llm.llm_engine
        try:
            with self._own_threads():
                outputs = self._llm.generate(prompts, settings, use_tqdm=False, lora_request=self._adapter)
        except BaseException:  # interrupted: drop unfinished requests, or the next call would return their completions
            engine.abort_request(list(engine.output_processor.request_states), internal=True)
            raise
        return [_completion(o.outputs[0]) for o in outputs]

    # ------------------------------------------------------------------------------------------------- weights

    def sync(self, policy: PolicyWeights) -> None:
        """Load the policy's merged weights, or its adapter, and clear the prefix cache."""
        if self._sync == "adapter":
            self._swap_adapter(policy)
        else:
            self._load(policy.merged_weights())
        self._drop_caches()

    def reset(self) -> None:
        """Load the checkpoint's own weights again."""
        self._adapter = None
        if self._sync == "merged":
            self._load(iter(()))
        self._drop_caches()

    def _load(self, changed: Iterator[tuple[str, Tensor]]) -> None:
        """Load what this policy changes, and the base weights of what only the one before it changed. Tensors are made one unit of
        the model at a time: all of a 32B model's at once would be a second model."""
        first = next(changed, None)
        if first is None and not self._loaded:
            return
        now: set[str] = set()
        changed = changed if first is None else itertools.chain([first], changed)
        with self._own_threads(), ExitStack() as files:
            weights = self._weights(changed, now, checkpoint(self._files, files))
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            if not all(IN_BLOCK.fullmatch(unit) for unit in self._loaded):
                _repack_tied_head(self._model)
        self._loaded = now

    def _weights(
        self, changed: Iterator[tuple[str, Tensor]], now: set[str], base: Units
    ) -> Iterator[tuple[str, Tensor]]:
        """Whole units: those with changed tensors, noted in `now`, then those that are the checkpoint's again."""

        def noted(unit: str) -> None:
            now.add(unit)
            self._loaded = self._loaded | {unit}  # should this be interrupted

        yield from whole_units(changed, base, noted)
        for unit in sorted(self._loaded - now):
            yield from ((name, read()) for name, read in base.get(unit, {}).items())

    def _swap_adapter(self, policy: PolicyWeights) -> None:
        from vllm.lora.request import LoRARequest

        with tempfile.TemporaryDirectory(prefix="rlsafe-adapter-", dir=_in_memory()) as directory:
            policy.save_adapter(directory, dtype=self._dtype)
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
        """Add vectors [H] to the residual stream at all positions from now on, or take the part in S [H, n] out; None ends it.

        UserError for layers or shapes that do not fit, or with CUDA graphs.
        """
        additions = additions or {}
        if additions and not self._eager:
            raise UserError("this vLLM engine runs CUDA graphs and cannot be steered; expected an eager one")
        config = self._llm.model_config.hf_text_config
        for layer, vector in additions.items():
            check_vector(vector, layer, config.hidden_size, config.num_hidden_layers)
        for hook in self._hooks:
            hook.remove()
        blocks = decoder_blocks(self._model, config.num_hidden_layers, self.model_dir)
        self._hooks = [_steer_block(blocks, layer, vector.detach().clone()) for layer, vector in additions.items()]
        self._drop_caches()

    def close(self) -> None:
        """Shut the engine down and free its memory."""
        if self.closed:
            return
        self.closed = True
        for hook in self._hooks:
            hook.remove()
        with ranks.ending(self):
            self._llm.llm_engine.engine_core.shutdown()
            del self._llm, self._model
            self._hooks = []


def _in_memory() -> str | None:
    """A directory in the machine's memory; None where there is none, or no room for an adapter."""
    try:
        disk = os.statvfs(SHARED_MEMORY)
    except OSError:
        return None
    fits = os.access(SHARED_MEMORY, os.W_OK) and disk.f_bavail * disk.f_frsize >= SHARED_MEMORY_FREE
    return SHARED_MEMORY if fits else None


def _completion(output: Any) -> Completion:
    ids = list(output.token_ids)
    logprobs = [position[i].logprob for i, position in zip(ids, output.logprobs, strict=True)]
    return Completion(ids, logprobs, "stop" if output.finish_reason == "stop" else "length")


def _model_of(llm: Any) -> nn.Module:
    models: list[nn.Module] = []
    llm.apply_model(models.append)
    return models[0]


def _lora_settings(rank: int | None) -> dict[str, Any]:
    """Engine settings for one adapter of `rank`. UserError when it is too large."""
    room = next((r for r in LORA_RANKS if r >= (rank or 1)), None)
    if room is None:
        raise UserError(f"sampler.sync: vLLM takes adapters up to rank {LORA_RANKS[-1]}, got {rank}; use merged")
    return {"enable_lora": True, "max_lora_rank": room, "max_loras": 1, "max_cpu_loras": 1}


def _repack_tied_head(model: nn.Module) -> None:
    """On CPU vLLM computes a tied head from its own packed copy of the embeddings, which reloading leaves as it was."""
    seen: set[int] = set()
    for module in model.modules():
        weight, method = getattr(module, "weight", None), getattr(module, "quant_method", None)
        if method is None or weight is None or not weight.numel():
            continue
        if id(weight) in seen:
            method.process_weights_after_loading(module)
        seen.add(id(weight))


def _steer_block(blocks: Any, layer: int, vector: Tensor) -> Any:
    """vLLM's blocks take (positions, hidden [N, H], residual) and give (hidden, residual).

    The sum of the two is the residual stream, so adding to `hidden` adds to the stream.
    """

    def after(_: nn.Module, __: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        stream = hidden
        if (
            vector.dim() == 2 and isinstance(output, tuple) and output[1] is not None
        ):  # a part is taken out of the whole sum
            stream = hidden + output[1]
        hidden = hidden + steered(vector, stream)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if "hidden_states" in kwargs:
            hidden = kwargs["hidden_states"]
            return args, kwargs | {"hidden_states": hidden + steered(vector, hidden)}
        at = next(i for i, arg in enumerate(args) if isinstance(arg, Tensor) and arg.is_floating_point())
        return (*args[:at], args[at] + steered(vector, args[at]), *args[at + 1 :]), kwargs

    if layer == 0:
        return blocks[0].register_forward_pre_hook(before, with_kwargs=True)
    return blocks[layer - 1].register_forward_hook(after)
