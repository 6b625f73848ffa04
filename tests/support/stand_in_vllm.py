"""A module that stands in for vLLM on a machine with a GPU and records what it is asked for."""

from __future__ import annotations

import gc
import random
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rlsafe import rollouts
from rlsafe.rollouts import ranks


class Engine:
    """What `vllm.LLM` was made with, and whether it still lives."""

    made: list[Engine] = []
    fails: Exception | None = None
    answers: Any = None  # called while it generates

    def __init__(self, **settings: Any):
        random.seed(0)  # as vLLM does when it starts, also of the GPU's generator
        np.random.seed(0)
        torch.manual_seed(0)
        torch.cuda.set_rng_state(torch.tensor([0], dtype=torch.uint8))
        if Engine.fails:
            raise Engine.fails
        gc.freeze()  # as vLLM does when it has started
        self.settings, self.open, self.loaded = settings, True, []
        self.model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])})
        Engine.made.append(self)
        self.model_config = SimpleNamespace(hf_text_config=SimpleNamespace(hidden_size=64, num_hidden_layers=2))
        self.llm_engine = SimpleNamespace(
            engine_core=SimpleNamespace(shutdown=self.shutdown), add_lora=self.loaded.append, remove_lora=lambda number: None,
            abort_request=lambda *a, **k: None, output_processor=SimpleNamespace(request_states={}),
        )  # fmt: skip

    def shutdown(self) -> None:
        sys.modules["vllm.v1.engine.core"].cleanup_dist_env_and_memory()
        self.open = False

    def apply_model(self, run: Any) -> None:
        run(self.model)

    def collective_rpc(self, name: Any, kwargs: Any = None) -> None:
        if name == "reload_weights":
            self.loaded.append([(key, tensor.dtype) for key, tensor in kwargs["weights_iterator"]])

    def reset_prefix_cache(self) -> bool:
        return True

    def generate(self, prompts: Any, settings: Any, **_: Any) -> list[Any]:
        if Engine.answers:
            Engine.answers()
        output = SimpleNamespace(token_ids=[1], logprobs=[{1: SimpleNamespace(logprob=-1.0)}], finish_reason="length")
        return [SimpleNamespace(outputs=[output]) for _ in prompts]


@pytest.fixture
def vllm(monkeypatch):
    """The stand-in on a machine with one GPU of 80 GiB: `Engine.made` are its engines."""
    module, core = ModuleType("vllm"), ModuleType("vllm.v1.engine.core")
    module.LLM, module.SamplingParams = Engine, lambda **settings: SimpleNamespace(**settings)
    module.sampling_params = SimpleNamespace(RequestOutputKind=SimpleNamespace(FINAL_ONLY=1))
    lora = ModuleType("vllm.lora.request")
    lora.LoRARequest = lambda name, number, path: SimpleNamespace(name=name, lora_int_id=number, path=path)
    core.cleanup_dist_env_and_memory = lambda: torch.distributed.destroy_process_group()
    for name, one in (("vllm", module), ("vllm.lora.request", lora), ("vllm.v1.engine.core", core)):
        monkeypatch.setitem(sys.modules, name, one)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (60 << 30, 80 << 30))
    states = [torch.tensor([7], dtype=torch.uint8)]  # the GPU's generator
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda *_: states[-1])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, *_: states.append(state))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda group=None: None)
    monkeypatch.setattr(Engine, "made", [])
    monkeypatch.setattr(Engine, "fails", None)
    monkeypatch.setattr(Engine, "answers", None)
    monkeypatch.setattr(rollouts, "_ENGINES", {})
    monkeypatch.setattr(rollouts, "_REFUSED", {})
    monkeypatch.setattr(ranks, "_alive", type(ranks._alive)())
    return Engine


__all__ = ["Engine", "vllm"]
