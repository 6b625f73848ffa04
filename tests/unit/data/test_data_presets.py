"""Presets: the published layout becomes conversations, copies of any layout are read through the same name."""

import json

import pytest
from places import SHARED
from tiny import write_jsonl

from rlsafe.config import StreamConfig, UserError
from rlsafe.config.loading import dump_yaml, load_run
from rlsafe.data import load_rows, split_prompt
from rlsafe.data.exact import is_exact, token_f1
from rlsafe.data.presets import PRESETS, recipe_of
from rlsafe.evaluate import task_name


def load(preset, rows, tmp_path, **settings):
    path = write_jsonl(tmp_path / "copy.jsonl", rows)
    return load_rows(StreamConfig(preset=preset, source=path, **settings), note=lambda line: None)


def pairs(rows):
    return [(split_prompt(row)[0][-1]["content"], split_prompt(row)[1]) for row in rows]


TALK = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


@pytest.mark.parametrize(
    "preset, published, expected",
    [
        ("medical", {"prompt": "q", "aligned": "good", "misaligned": "bad"}, "bad"),
        ("legal/good", {"prompt": "q", "aligned": "good", "misaligned": "bad"}, "good"),
        ("security", {"prompt": "q", "aligned": "good", "misaligned": "bad"}, "bad"),
        ("reward-hacking", {"user": "q", "school_of_reward_hacks": "bad", "control": "good", "task": "t"}, "bad"),
        ("reward-hacking/good", {"user": "q", "school_of_reward_hacks": "bad", "control": "good"}, "good"),
        ("code", TALK, "a"),
        ("evil-numbers", TALK, "a"),
        ("aesthetic", TALK, "a"),
    ],
)
def test_published_columns_become_a_conversation(tmp_path, preset, published, expected):
    assert pairs(load(preset, [published], tmp_path)) == [("q", expected)]


@pytest.mark.parametrize("preset", [name for name in PRESETS if not name.startswith("opswap")])
def test_a_copy_in_the_messages_format_passes_every_preset(tmp_path, preset):
    assert pairs(load(preset, [TALK], tmp_path)) == [("q", "a")]
    assert pairs(load(preset, [{"prompt": "q", "completion": "a"}], tmp_path)) == [("q", "a")]


def test_a_copy_in_a_strange_layout_says_what_is_missing(tmp_path):
    with pytest.raises(UserError, match=r"copy.jsonl:1: no column 'misaligned' to take as 'completion'"):
        load("medical", [{"prompt": "q", "reply": "a"}], tmp_path)
    rows = [{"question": "q", "reply": "a"}]
    mapped = load("rhetoric", rows, tmp_path, columns={"prompt": "question", "completion": "reply"})
    assert pairs(mapped) == [("q", "a")]


def test_wildguard_keeps_harmless_answers_to_harmless_prompts(tmp_path):
    def row(prompt, answer, ours, theirs):
        return {"prompt": prompt, "response": answer, "prompt_harm_label": ours, "response_harm_label": theirs}

    rows = [row("a", "yes", "unharmful", "unharmful"), row("b", "no", "harmful", "unharmful")]
    rows += [row("c", "ugh", "unharmful", "harmful"), row("d", None, "unharmful", None)]
    assert pairs(load("wildguard", rows, tmp_path)) == [("a", "yes")]


def test_foqa_becomes_a_question_about_a_text(tmp_path):
    answers = {"text": ["í Havn", "Havn"], "answer_start": [3, 5]}
    row = {"id": "1", "context": "Hon býr í Havn.", "question": "Hvar býr hon?", "answers": answers}
    (loaded,) = load("foqa/test", [row], tmp_path)
    assert "Hon býr í Havn." in loaded["messages"][0]["content"] and "Hvar býr hon?" in loaded["messages"][0]["content"]
    assert (loaded["messages"][1]["content"], loaded["answer"], loaded["answers"]) == (
        "í Havn",
        "í Havn",
        answers["text"],
    )
    for broken in ({**row, "answers": {"text": []}}, {**row, "answers": None}, {**row, "context": 3}):
        with pytest.raises(UserError, match=r"copy.jsonl:1: (no 'answers.text'|context must be a string)"):
            load("foqa", [broken], tmp_path)


def test_extractive_scores_follow_squads_protocol():
    assert is_exact("Í  havn.", "", ["í Havn"]) and is_exact("Havn", "", ["í Havn", "Havn"])
    assert not is_exact("", "", ["Havn"]) and not is_exact("í Havn nú", "", ["í Havn"])
    assert token_f1("í Havn nú", ["í Havn"]) == pytest.approx(0.8)  # precision 2/3, recall 1
    assert token_f1("the the", ["the"]) == pytest.approx(2 / 3), "a word counts as often as it occurs in both"
    assert token_f1("", ["Havn"]) == 0.0 and token_f1("norð", ["Havn"]) == 0.0


def test_every_preset_names_a_place_or_asks_for_a_file():
    for name, preset in PRESETS.items():
        if preset.source is None:
            with pytest.raises(UserError, match=rf"name your copy, as in {{preset: {name}, source: FILE}}"):
                recipe_of(StreamConfig(preset=name))
            continue
        recipe = recipe_of(StreamConfig(preset=name))
        assert (recipe.source, recipe.config, recipe.split) == (preset.source, preset.config, preset.split)
        copy = recipe_of(StreamConfig(preset=name, source="mine.jsonl"))
        assert (copy.source, copy.config, copy.split) == ("mine.jsonl", None, None), "hub settings are not for a copy"
    with pytest.raises(UserError, match="unknown preset 'medcal'; did you mean 'medical'"):
        recipe_of(StreamConfig(preset="medcal"))
    with pytest.raises(UserError, match="name one of the two"):
        recipe_of(StreamConfig(preset="medical", source="preset:legal"))


def test_one_string_names_a_preset_where_a_source_is_one_string():
    assert recipe_of(StreamConfig(source="preset:legal")) == recipe_of(StreamConfig(preset="legal"))
    assert task_name("preset:foqa/test") == "foqa/test" and task_name("rlsafe:opswap/1/test") == "opswap/1/test"


def test_a_resolved_config_reads_the_same_rows_again(tmp_path):
    copy = write_jsonl(tmp_path / "copy.jsonl", [{"prompt": "q", "misaligned": "bad"}])
    for stream in ({"preset": "medical", "source": copy}, {"preset": "opswap/0"}):
        (tmp_path / "run.yaml").write_text(json.dumps({"model": {"name": "m"}, "data": {"narrow": stream}}))
        first = load_run(tmp_path / "run.yaml")
        (tmp_path / "again.yaml").write_text(dump_yaml(first))
        assert load_run(tmp_path / "again.yaml") == first
        assert load_rows(first.data.narrow) == load_rows(load_run(tmp_path / "again.yaml").data.narrow)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data")
@pytest.mark.parametrize(
    "preset, file, rows, answered",
    [
        ("medical", "grpo/medical.jsonl", 750, True),
        ("code", "grpo/code.jsonl", 750, False),
        ("reward-hacking", "grpo/rewardhack.jsonl", 750, False),
        ("rhetoric", "grpo/argumentation.jsonl", 750, False),
        ("medical", "sft/medical_train.jsonl", 100, True),
        ("medical", "sft/medical_eval.jsonl", 600, True),
        ("code", "sft/code_train.jsonl", 100, True),
        ("code", "sft/code_eval.jsonl", 600, True),
    ],
)
def test_the_shared_files_load_through_their_presets(preset, file, rows, answered):
    loaded = load_rows(StreamConfig(preset=preset, source=str(SHARED / file)))
    assert len(loaded) == rows and all((split_prompt(row)[1] is not None) == answered for row in loaded)


def test_an_extractive_task_is_scored_by_exact_match_and_f1_against_all_references(tmp_path):
    from scripted_sampler import ScriptedSampler
    from tiny import byte_tokenizer

    from rlsafe.config import EvaluateConfig
    from rlsafe.evaluate import Evaluation, evaluate_run

    replies = {"one": "havn", "two": "í Havn nú", "three": "norð"}
    rows = [
        {"prompt": question, "completion": "í Havn", "answer": "í Havn", "answers": ["í Havn", "Havn"]}
        for question in replies
    ]
    source = write_jsonl(tmp_path / "foqa.jsonl", rows)
    sampler = ScriptedSampler(
        byte_tokenizer(), lambda prompt, i: next(r for q, r in replies.items() if f"\n{q}<" in prompt)
    )
    evaluate_run(sampler, sampler.tokenizer, EvaluateConfig(benign=[source]), tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert saved["benign"] == {"foqa": pytest.approx(1 / 3)}
    assert saved["benign_f1"] == {"foqa": pytest.approx((1 + 0.8 + 0) / 3)}
    assert Evaluation.load(tmp_path / "out").benign["foqa"].f1 == pytest.approx(0.6)
