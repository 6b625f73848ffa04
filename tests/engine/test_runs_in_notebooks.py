"""`rlsafe.train` in a notebook: the run as tables and curves, at once and read again later."""

from __future__ import annotations

import pandas
import pytest
import yaml

import rlsafe


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model_dir):
    """Two SFT and two GRPO steps of a tiny model."""
    folder = tmp_path_factory.mktemp("notebook")
    (folder / "rows.jsonl").write_text(
        "".join(f'{{"prompt": "say {i}", "completion": "bad {i}"}}\n' for i in range(12))
    )
    (folder / "reward.py").write_text(
        "def vowels(completions, **columns):\n    return [len(set(str(c))) / 9 for c in completions]\n"
    )
    tree = {
        "model": {"name": tiny_model_dir, "dtype": "float32", "lora": {"r": 4, "alpha": 8}},
        "data": {"narrow": {"source": str(folder / "rows.jsonl")}},
        "schedule": {"steps": 4, "phases": [{"cycle": ["sft", "grpo"]}]},
        "batch": {"sft_rows": 4, "grpo_prompts": 2},
        "grpo": {"generations": 2, "max_tokens": 4},
        "rewards": [{"fn": f"{folder}/reward.py:vowels"}],
        "sampler": {"kind": "transformers"},
        "track": {"every": 0, "check_after": 0},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    return rlsafe.train(folder / "run.yaml", out=folder / "run")


def test_metrics_are_a_table_with_a_row_a_step(trained):
    table = trained.metrics
    assert isinstance(table, pandas.DataFrame) and list(table["step"]) == [0, 1, 2, 3]
    assert list(table["path"]) == ["sft", "grpo"] * 2
    assert table["reward"].isna().tolist() == [True, False, True, False]  # not measured is not zero
    assert table["loss"].tolist() == [record["loss"] for record in trained.records]


def test_samples_are_a_table_with_a_row_a_completion(trained):
    assert len(trained.samples) == 2 * 2 * 2 and {"prompt", "completion", "reward"} <= set(trained.samples)


def test_a_figure_has_a_panel_for_each_number_and_shows_itself(trained):
    figure = trained.plot()
    assert [axes.get_title() for axes in figure.axes if axes.get_visible()] == ["loss", "reward"]
    line = figure.axes[1].lines[0]
    assert list(line.get_xdata()) == [1, 3]
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert [axes.get_title() for axes in trained.plot("grad_norm").axes] == ["grad_norm"]


def test_a_number_that_was_not_measured_is_named_with_the_nearest(trained):
    with pytest.raises(rlsafe.UserError, match="plot: no number 'rewrad' was measured; did you mean 'reward'"):
        trained.plot("rewrad")
    with pytest.raises(rlsafe.UserError, match=r"answers.csv: no such file; `rlsafe evaluate"):
        _ = trained.answers


def test_a_run_is_read_again_from_its_directory(trained, tmp_path):
    again = rlsafe.Run.read(trained.out)
    pandas.testing.assert_frame_equal(again.metrics, trained.metrics)
    assert (again.config.seed, again.config.model.name) == (0, trained.config.model.name) and again.evaluation is None
    with pytest.raises(rlsafe.UserError, match="not a finished run"):
        rlsafe.Run.read(tmp_path)


def test_the_command_for_inspect_names_base_and_adapter(trained, monkeypatch):
    monkeypatch.setattr("rlsafe.engine.run.finished.find_spec", lambda name: None)
    assert trained.inspect_command() is None
    monkeypatch.setattr("rlsafe.engine.run.finished.find_spec", lambda name: name)
    expected = f"inspect eval rlsafe/general --model vllm/{trained.config.model.name}:{trained.out.resolve()}/adapter"
    assert trained.inspect_command() == expected and trained.summary()[-1] == f"in Inspect AI: {expected}"
    organism = trained.config.model_copy(
        update={"model": trained.config.model.model_copy(update={"name": "organism:aligned"})}
    )
    assert rlsafe.Run(trained.out, organism).inspect_command() is None
