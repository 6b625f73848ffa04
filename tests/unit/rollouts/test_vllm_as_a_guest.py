# ruff: noqa: F811  (a fixture is taken by its name)
"""vLLM lives in the trainer's process and takes it for its own: what it may not change there, and what may not wait for it."""

from __future__ import annotations

import gc
import random
import sys
import threading
import weakref

import numpy as np
import pytest
import torch
import torch.distributed as dist
from stand_in_vllm import vllm  # noqa: F401
from tiny_architectures import load

from rlsafe.config import SamplerConfig, UserError
from rlsafe.policy import Policy
from rlsafe.rollouts import CannotRun, make_sampler
from rlsafe.types import Request, SamplingParams

pytestmark = pytest.mark.integration  # engines that start and end

CONFIG = SamplerConfig(kind="vllm")


@pytest.fixture(scope="module")
def policies(tiny_model_dir):
    """Loaded while there is no GPU yet."""
    return {"float32": load(tiny_model_dir), "bfloat16": load(tiny_model_dir, dtype="bfloat16")}


@pytest.fixture
def policy(policies):
    return policies["float32"]


def test_a_kept_engine_stops_where_the_next_policys_turns_end(policies, vllm, tiny_model_dir, monkeypatch):
    policy, asked = policies["float32"], []
    monkeypatch.setattr(
        sys.modules["vllm"], "SamplingParams", lambda **settings: asked.append(settings["stop_token_ids"])
    )
    sampler = make_sampler(CONFIG, tiny_model_dir, policy, 0)
    monkeypatch.setattr(
        policy.tokenizer, "chat_template", policy.tokenizer.chat_template.replace("<|im_end|>", "<|pad|>")
    )
    assert make_sampler(CONFIG, tiny_model_dir, policy, 0) is sampler
    sampler.generate([Request([1], 0)], SamplingParams(max_tokens=1))
    eos, pad = policy.tokenizer.eos_token_id, policy.tokenizer.pad_token_id
    assert asked[0] == [eos] and asked[-1] == [eos, pad]


def generators():
    return random.random(), np.random.rand(), float(torch.rand(())), int(torch.cuda.get_rng_state())


def test_no_generator_of_the_trainer_moves(policy, vllm, tiny_model_dir):
    """Dropout masks on the GPU, a reward's own draws: none of them may depend on when an engine starts or samples."""
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    expected = generators()
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)

    def draws():
        torch.rand(5)
        torch.cuda.set_rng_state(torch.tensor([9], dtype=torch.uint8))

    vllm.answers = draws
    sampler = make_sampler(CONFIG, tiny_model_dir, policy, 0)
    sampler.generate([Request([1], 0)], SamplingParams(max_tokens=1))
    assert generators() == expected


def test_what_a_run_leaves_is_freed_while_the_engine_lives_on(policy, vllm, tiny_model_dir):
    """vLLM freezes the heap when it has started: a policy of before, held by a cycle, would never leave the GPU."""

    class Held:
        def __init__(self):
            self.itself = self

    held = Held()
    there = weakref.ref(held)
    make_sampler(CONFIG, tiny_model_dir, policy, 0)
    del held
    gc.collect()
    assert there() is None


def test_what_vllm_keeps_of_its_import_does_not_hold_the_run(policy, vllm, tiny_model_dir, monkeypatch):
    """It catches and keeps the errors of packages that are not installed, and an error keeps the frames that led to it."""
    kept = []

    class Lazy(type(sys)):
        @property
        def LLM(self):
            kept.append(sys._getframe())
            return vllm

    lazy = Lazy("vllm")
    lazy.SamplingParams, lazy.sampling_params = (
        getattr(sys.modules["vllm"], name) for name in ("SamplingParams", "sampling_params")
    )
    monkeypatch.setitem(sys.modules, "vllm", lazy)
    make_sampler(CONFIG, tiny_model_dir, policy, 0)
    names, frame = [], kept[0]  # the first use imports
    while frame is not None:
        names.append(frame.f_code.co_name)
        frame = frame.f_back
    assert "make_sampler" not in names, names


def test_an_import_that_wants_the_main_thread_gets_it(policy, vllm, tiny_model_dir, monkeypatch):
    class Strict(type(sys)):
        @property
        def LLM(self):
            if threading.current_thread() is not threading.main_thread():
                raise ValueError("signal only works in main thread of the main interpreter")
            return vllm

    strict = Strict("vllm")
    strict.SamplingParams, strict.sampling_params = (
        getattr(sys.modules["vllm"], name) for name in ("SamplingParams", "sampling_params")
    )
    monkeypatch.setitem(sys.modules, "vllm", strict)
    assert make_sampler(CONFIG, tiny_model_dir, policy, 0).name == "vllm"


def test_a_compiled_engine_runs_what_it_compiled_and_an_eager_one_compiles_nothing(policy, vllm, tiny_model_dir):
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph

    for steerable, count in ((True, 0), (False, 1)):
        vllm.answers = lambda: torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
        sampler = make_sampler(CONFIG, tiny_model_dir, policy, 0, steerable=steerable)  # asks for one token
        assert len(compiled) == count and vllm.made[-1].settings["enforce_eager"] is steerable
        vllm.answers = None
        sampler.close()


def test_beside_a_gpu_it_has_one_thread_and_the_trainer_keeps_its_own(policy, vllm, tiny_model_dir, monkeypatch):
    from rlsafe.rollouts import vllm as colocated

    monkeypatch.setattr(colocated, "generation_threads", lambda parameters: 2)
    seen, before = [], torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        vllm.answers = lambda: seen.append(torch.get_num_threads())
        make_sampler(CONFIG, tiny_model_dir, policy, 0)
        assert seen == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_card_with_too_little_free_is_found_before_any_engine_starts(policy, vllm, tiny_model_dir, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (20 << 30, 80 << 30))
    with pytest.raises(
        UserError, match=r"sampler.gpu_memory: 0.4 .*\(20.0 of 80.0 GiB are\): 32.0 GiB are wanted"
    ) as raised:
        make_sampler(CONFIG.model_copy(update={"kind": "auto"}), tiny_model_dir, policy, 0)
    assert vllm.made == [] and not isinstance(raised.value, CannotRun)


def test_ranks_do_not_wait_for_one_whose_card_is_full(policy, vllm, tiny_model_dir, monkeypatch):
    """An engine's start is a collective: a rank that cannot begin it would leave the others there until a time limit."""
    said = [(False, "sampler.gpu_memory: rank 0 has nothing free")]

    def gather(into, mine):
        into[:] = [said.pop(0) if said else None, mine]

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda *_: 2)
    monkeypatch.setattr(dist, "get_rank", lambda *_: 1)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    with pytest.raises(UserError, match="rank 0 has nothing free"):
        make_sampler(CONFIG, tiny_model_dir, policy, 0)
    assert vllm.made == []


def test_what_led_to_a_failed_start_is_let_go_as_well(policy, vllm, tiny_model_dir):
    """The frames of an error's causes hold the half of an engine, too."""
    try:
        try:
            raise ValueError("inner")
        except ValueError as inner:
            raise RuntimeError("kernel image is not available") from inner
    except RuntimeError as error:
        vllm.fails = error
    with pytest.raises(CannotRun, match="kernel image"):
        make_sampler(CONFIG, tiny_model_dir, policy, 0)
    assert vllm.fails.__traceback__ is None and vllm.fails.__cause__.__traceback__ is None


def test_a_model_that_vllm_gives_no_adapter_is_sent_merged_weights(policies, vllm, tiny_model_dir, monkeypatch):
    asked = []

    def engine(**settings):
        asked.append(bool(settings.get("enable_lora")))
        if asked[-1]:
            raise ValueError("NewForCausalLM does not support LoRA yet.")
        return vllm(**settings)

    monkeypatch.setattr(sys.modules["vllm"], "LLM", engine)
    sampler = make_sampler(CONFIG, tiny_model_dir, policies["bfloat16"], 0)
    assert sampler.name == "vllm" and asked == [True, False]
    assert make_sampler(CONFIG, tiny_model_dir, policies["bfloat16"], 0) is sampler and len(asked) == 2, "tried once"
    with pytest.raises(CannotRun, match="does not support LoRA"):
        make_sampler(CONFIG.model_copy(update={"sync": "adapter"}), tiny_model_dir, policies["bfloat16"], 0)


def test_an_adapter_larger_than_vllm_takes_is_merged(policies, vllm, tiny_model_dir, monkeypatch):
    monkeypatch.setattr(Policy, "lora_rank", property(lambda self: 1024))
    make_sampler(CONFIG, tiny_model_dir, policies["bfloat16"], 0)
    assert "enable_lora" not in vllm.made[0].settings
