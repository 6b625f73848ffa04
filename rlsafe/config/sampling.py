"""Settings of the sampler: which engine answers, and how it gets the weights."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from rlsafe.config.base import Fraction, Place, Positive, Settings, to_list


class SamplerConfig(Settings):
    kind: Literal["auto", "vllm", "transformers", "server"] = Field(
        "auto", description="auto = vLLM where it runs the model, else Transformers, with a line that says why"
    )
    sync: Literal["auto", "merged", "adapter"] = Field(
        "auto", description="merged: fresh W + BA; adapter: LoRA hot-swap"
    )
    urls: Annotated[list[str], BeforeValidator(to_list())] = Field(
        default_factory=list, description="kind server: addresses of vLLM servers, e.g. http://host:8000"
    )
    adapter_dir: Place | None = Field(
        None, description="kind server: where adapters are saved for the servers to read; null = a temporary directory"
    )
    patience: Annotated[float, Field(gt=0)] = Field(
        600.0, description="kind server: seconds to go on trying servers that do not answer"
    )
    gpu_memory: Fraction = Field(0.4, description="vLLM's share of the GPU's memory")
    tensor_parallel: Positive = Field(
        1,
        description="processes of the run that share one vLLM engine, each with a part of its weights (not for servers)",
    )
    max_model_len: Positive | None = Field(
        None, description="tokens of prompt and completion; null = 4096 or the model's"
    )
    max_num_seqs: Positive = Field(256, description="sequences that vLLM generates at a time")
    self_test: bool = Field(True, description="compare the sampler's log-probs with the trainer's")
    max_gap: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="mean |trainer - sampler| log-prob allowed by the self-test; null = in float32 1e-3 (CPU) or 0.01 (GPU),"
        " in half precision 0.1, over an 8-bit base 0.3",
    )

    @model_validator(mode="after")
    def _urls_of_a_server(self) -> SamplerConfig:
        if (self.kind == "server") != bool(self.urls):
            raise ValueError("'kind: server' takes 'urls' (addresses of vLLM servers), and no other kind does")
        if self.tensor_parallel > 1 and self.kind in ("server", "transformers"):
            raise ValueError(
                f"'tensor_parallel' splits an engine over the run's processes, which kind {self.kind!r} does not have"
                + ("; start the server with --tensor-parallel-size" if self.kind == "server" else "")
            )
        return self
