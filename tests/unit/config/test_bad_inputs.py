"""Whatever a user gets wrong gives one clear line and exit code 2, through the real command, before or in the first batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from tiny import save_tiny_model

from rlsafe import cli
from rlsafe.config import load_run


def command(capsys, *arguments: str) -> tuple[int, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    return stop.value.code, capsys.readouterr().err


@pytest.fixture
def config(tiny_tree, tmp_path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(tiny_tree, sort_keys=False))
    return file


GRPO = "schedule.phases=[{cycle: grpo}]"

OVERRIDES: list[tuple[list[str], str]] = [
    (["optim.lrr=1"], "unknown key 'optim.lrr'; did you mean 'lr'?"),
    (["optimm.lr=1"], "did you mean 'optim'?"),
    (["optim.lr=fast"], "valid number"),
    (["optim.lr=-1"], "greater than 0"),
    (["optim.lr=.nan"], "optim.lr"),
    (["seed=one"], "seed: input should be a valid integer"),
    (["schedule.steps=-5"], "greater than or equal to 0"),
    (["schedule.phases=[]"], "at least 1 item"),
    (["schedule.phases=[{mix: {sft: 1}, cycle: [sft]}]"], "either 'cycle'"),
    (["schedule.phases=[{mix: {sft: 0}}]"], "must not all be zero"),
    (["schedule.phases=[{steps: 1, cycle: sft}]"], "cover 1 of 4 steps"),
    (["schedule.phases=[{cycle: benign-sft}]"], "data.benign is not set"),
    (["grpo.generations=1"], "greater than or equal to 2"),
    (["grpo.top_p=1.5"], "less than or equal to 1"),
    (["grpo.normalization=mean"], "'grpo', 'dr_grpo', 'dapo' or 'bnpo'"),
    (["rewards=[]", GRPO], "need a reward"),
    (["rewards=[{fn: nowhere.py:f}]", GRPO], "nowhere.py: no such Python file"),
    (["rewards=[{fn: no_package_here:f}]", GRPO], "no module 'no_package_here'"),
    (["defenses=[klx]"], "did you mean 'kl'?"),
    (["defenses=[{kl: {wait: 1}}]"], "unknown setting 'wait'"),
    (["defenses=[{kl: {reference: nowhere}}]"], "nowhere"),
    (["defenses=[{kl: {estimator: k3}}]"], "needs GRPO completions"),
    (["defenses=[inoculation]"], "'prompt' is required"),
    (["defenses=[{inoculation: {prompt: x, at: rollout}}]"], "no effect without GRPO"),
    (["defenses=[interleaving]", "data.safe=null"], "no safe rows"),
    (["data.narrow.source=missing.jsonl"], "missing.jsonl"),
    (["data.narrow.source=organism:medicine/bad"], "unknown organism rows 'medicine/bad'"),
    (["data.narrow=null"], "data.narrow is not set"),
    (["model.lora=none"], "model.lora: expected settings (r, alpha, dropout, rslora, targets, fused), got 'none'"),
    (
        ["schedule.phases=[{cycle: [sfft]}]"],
        "error: override 'schedule.phases=[{cycle: [sfft]}]': schedule: unknown step kind 'sfft'; did you mean 'sft'?",
    ),
    (["sampler.kind=server"], "error: override 'sampler.kind=server': sampler: 'kind: server' takes 'urls'"),
    (["defenses=[kl]", "defenses.0.weight=1"], "defenses.0 is 'kl' and holds no 'weight'"),
    (["data.narrow.max_tokens=3"], "longer than max_tokens"),
    (["model.name=/no/such/model"], "/no/such/model"),
    (["model.name=organism:align"], "error: model.name: unknown organism model 'align'; did you mean 'aligned'?"),
    (["defenses=[kll]"], "error: defenses: unknown defense 'kll'; did you mean 'kl'?"),
    (["data.narrow.source=organism:medicl/bad"], "error: data.narrow: unknown organism rows 'medicl/bad'"),
    (["data.narrow.source=rows.jsnl"], "error: data.narrow: unknown data source"),
    (["rewards=organism:good_"], "error: rewards: unknown organism reward 'good_'; did you mean 'good'?"),
    (
        ["evaluate.judge=organism", "evaluate.cue=organism:weak", "evaluate.general=organism:general"],
        "error: evaluate.cue: ",
    ),
    (["defenses=[{inoculation: {prompt: 'organism:evl'}}]"], "error: defenses: unknown organism prompt 'evl'"),
    (["defenses=[{persona: {vectors: 'organism:alignd', layer: 1}}]"], "error: defenses: unknown organism model"),
    (["defenses=[{safelora: {base: 'organism:bse'}}]"], "error: defense 'safelora': unknown organism model"),
    (["schedul.steps=3"], "error: override 'schedul.steps=3': unknown key 'schedul'; did you mean 'schedule'?"),
    (["lr=1e-3"], "unknown key 'lr'; did you mean 'optim.lr'?"),
    (["grpo.lr=1e-3"], "unknown key 'grpo.lr'; did you mean 'optim.lr'?"),
    (["plugins=mine.py"], "got 'mine.py'; write [mine.py]"),
    (["defenses=[of-my-own]"], "one of your own needs plugins=[FILE.py], too"),
    (["model.adapter=/no/such/adapter"], "/no/such/adapter: no such directory"),
    (["model.lora.targets=[q_projection]"], "matches no module"),
    (["model.lora.r=0"], "greater than or equal to 1"),
    (["model.dtype=float8"], "model.dtype"),
    (["sampler.kind=vlm"], "'vllm', 'transformers'"),
    (["evaluate.judge=oracle", "evaluate.general=organism:general"], "oracle"),
    (["evaluate.judge=organism", "evaluate.general=organism:generall"], "error: evaluate.general: unknown organism"),
    (["evaluate.judge=organism", "evaluate.general=questions.yaml"], "questions.yaml"),
    (["plugins=[nowhere.py]"], "nowhere.py: no such Python file"),
    (["optim.lr"], "expected key.path=value"),
    (["optim.lr=[1"], "the value is read as YAML, and is not valid"),
    (["schedule.phases.7.steps=1"], "is no index"),
]


@pytest.mark.parametrize(("overrides", "expected"), OVERRIDES, ids=[" ".join(o) for o, _ in OVERRIDES])
def test_a_wrong_setting_is_one_line_and_exit_code_2(capsys, config, tmp_path, overrides, expected):
    code, error = command(capsys, "train", str(config), *overrides, "--out", str(tmp_path / "out"))
    lines = [line for line in error.splitlines() if line.startswith("error:")]
    assert code == 2, error
    assert len(lines) == 1 and expected in lines[0], error
    assert "Traceback" not in error


FILES: list[tuple[str, str]] = [
    ("", "empty file"),
    ("- a\n- b\n", "expected a mapping"),
    ("seed: 1\nseed: 2\n", ":2: the key 'seed' is written twice"),
    ("model: {name: x\n", "not valid YAML"),
    ("model: {name: x}\nschedule:\n  stepz: 3\n", ":3: unknown key 'schedule.stepz'; did you mean 'steps'?"),
    ("schedule: {steps: 3}\n", "the key 'model' is required"),
    ("include: [missing.yaml]\n", "no such config file"),
    ("run: {model: {name: x}}\npaths: {sft: {}}\n", "describes a comparison, not one run; use: rlsafe compare"),
    ("include: [bad.yaml]\n", "includes itself"),
]


@pytest.mark.parametrize(("text", "expected"), FILES)
def test_a_wrong_config_file_names_the_line(capsys, tmp_path, text, expected):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    code, error = command(capsys, "train", str(file))
    assert code == 2 and expected in error and str(tmp_path) in error


def test_a_directory_in_the_place_of_a_config_names_the_files_in_it(capsys, tmp_path):
    (tmp_path / "a.yaml").write_text("seed: 1\n")
    code, error = command(capsys, "train", str(tmp_path))
    assert code == 2 and f"{tmp_path}: is a directory; expected a YAML file, such as one of: a.yaml" in error


def test_an_address_is_no_config(capsys):
    code, error = command(capsys, "train", "https://example.org/run.yaml")
    assert code == 2 and "https://example.org/run.yaml: expected a YAML file on this machine" in error


def test_the_config_of_one_run_is_no_comparison(capsys, config):
    code, error = command(capsys, "compare", str(config), "--dry-run")
    assert code == 2 and f"{config}: describes one run, not a comparison; use: rlsafe train {config}" in error


def test_one_defense_or_reward_may_stand_for_a_list_and_a_text_for_a_reward(config):
    run = load_run(config, ["defenses=kl", "rewards=[my.py:short, {fn: 'my.py:long', weight: 2}]"])
    assert run.defenses == ["kl"] and [(r.fn, r.weight) for r in run.rewards] == [("my.py:short", 1), ("my.py:long", 2)]
    assert load_run(config, ["rewards=my.py:short"]).rewards == run.rewards[:1]


ROWS: list[tuple[str, str]] = [
    ("", "dataset is empty"),
    ("not json\n", "rows.jsonl:1"),
    ('{"messages": []}\n', "rows.jsonl:1"),
    ('{"text": "hello"}\n', "messages"),
    ('{"messages": [{"role": "user"}]}\n', "content"),
    ('{"messages": [{"role": "oracle", "content": "x"}]}\n', "role"),
    ('{"messages": [{"role": "user", "content": "x"}]}\n', "answer"),
]


@pytest.mark.parametrize(("text", "expected"), ROWS)
def test_a_wrong_dataset_names_file_and_line(capsys, config, tmp_path, text, expected):
    file = tmp_path / "rows.jsonl"
    file.write_text(text)
    code, error = command(capsys, "train", str(config), f"data.narrow.source={file}", "--out", str(tmp_path / "out"))
    assert code == 2 and expected in error and "rows.jsonl" in error, error


REWARDS: list[tuple[str, str]] = [
    ("def f(prompts, completions, **k): return [1.0]", "returned 1"),
    ("def f(prompts, completions, **k): return [float('nan')] * len(completions)", "nan"),
    ("def f(prompts, completions, **k): return ['good'] * len(completions)", "'good'"),
    ("def f(prompts, completions, **k): return None", "None"),
    ("def f(prompts, completions, **k): raise KeyError('answer')", "KeyError"),
    ("async def f(prompts, completions, **k): return [1.0]", "returned 1"),
    ("f = 3", "not a function"),
    ("import nothing_of_that_name", "reward.py:1"),
    ("def g(prompts, completions, **k): return []", "no function 'f'"),
]


@pytest.mark.parametrize(("text", "expected"), REWARDS)
def test_a_wrong_reward_is_found_in_the_first_batch(capsys, config, tmp_path, text, expected):
    file = tmp_path / "reward.py"
    file.write_text(text + "\n")
    arguments = ["train", str(config), GRPO, f"rewards=[{{fn: '{file}:f'}}]", "--out", str(tmp_path / "out")]
    code, error = command(capsys, *arguments)
    assert code == 2 and expected in error and "reward" in error, error


def test_a_model_without_chat_template_says_how_to_give_one(capsys, config, tmp_path):
    model = Path(save_tiny_model(tmp_path / "bare"))
    (model / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    code, error = command(capsys, "train", str(config), f"model.name={model}", "--out", str(tmp_path / "out"))
    assert code == 2 and "no chat template" in error and "model.chat_template" in error


def test_reward_failures_after_the_first_batch_follow_on_error(capsys, config, tmp_path):
    file = tmp_path / "late.py"
    file.write_text(
        "def f(prompts, completions, trainer_state=None, **k):\n"
        "    if trainer_state.global_step > 0:\n        raise OSError('the server is gone')\n"
        "    return [float(len(c[0]['content'])) for c in completions]\n"
    )
    arguments = ["train", str(config), GRPO, f"rewards=[{{fn: '{file}:f'}}]"]
    code, error = command(capsys, *arguments, "--out", str(tmp_path / "stop"))
    assert code == 1 and "the server is gone" in error and "Traceback" not in error
    code, error = command(capsys, *arguments, "grpo.on_error=skip", "--out", str(tmp_path / "skip"))
    assert code == 0, error
    records = [json.loads(line) for line in open(tmp_path / "skip" / "metrics.jsonl")]
    assert [record["reward"] is None for record in records] == [False, True, True, True]
    assert [record["reward_missing"] for record in records] == [0, 12, 12, 12]


def test_an_output_directory_in_use_is_never_overwritten_silently(capsys, config, tmp_path):
    out = tmp_path / "out"
    assert command(capsys, "train", str(config), "--out", str(out))[0] == 0
    before = (out / "metrics.jsonl").read_text()
    code, error = command(capsys, "train", str(config), "--out", str(out))
    assert code == 2 and "finished run" in error and (out / "metrics.jsonl").read_text() == before
    assert command(capsys, "train", str(config), "--out", str(out), "--resume")[0] == 0
    assert (out / "metrics.jsonl").read_text() == before
    assert command(capsys, "train", str(config), "--out", str(out), "--overwrite", "seed=1")[0] == 0
    stranger = tmp_path / "mine"
    stranger.mkdir()
    (stranger / "thesis.tex").write_text("years of work")
    code, error = command(capsys, "train", str(config), "--out", str(stranger))
    assert code == 2 and "not a run" in error and (stranger / "thesis.tex").exists()
    assert command(capsys, "train", str(config), "--out", str(tmp_path / "none"), "--resume")[0] == 2
