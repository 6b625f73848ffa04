"""Config files as people write them: `on` as a key, includes that name nothing, homes, rates that nothing would read."""

from __future__ import annotations

import pytest
import yaml

from rlsafe.config import UserError, dump_yaml, load_run
from rlsafe.data import load_rows
from rlsafe.data.selection_scores import read_scores
from rlsafe.defenses import build, directions
from rlsafe.defenses.onpolicy import _in_full
from rlsafe.evaluate import load_judge
from rlsafe.evaluate.ask.cues import load_cues
from rlsafe.evaluate.ask.questions import load_questions
from rlsafe.evaluate.measure.hashing import contents


@pytest.fixture
def load(tmp_path, tiny_tree):
    def load(text: str, *overrides: str):
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(tiny_tree) + text)
        return load_run(path, overrides)

    return load


def test_on_is_a_key_like_any_other(load):
    """YAML 1.1 reads a bare `on` as true, and `on: [safe]` is a setting of seven defenses."""
    from_file = load("\ndefenses:\n  - kl: {weight: 0.1, on: [safe]}\n").defenses
    from_line = load("", "defenses=[{kl: {weight: 0.1, on: [safe]}}]").defenses
    assert from_file == from_line == [{"kl": {"weight": 0.1, "on": ["safe"]}}]
    build(from_file)


@pytest.mark.parametrize("written, read", [("yes", True), ("off", False), ("true", True), ("False", False)])
def test_truth_values_may_still_be_written_as_words(load, written, read):
    """In mappings that no schema knows, too: `no` for a reward of one's own must not become a text that counts as true."""
    given = f"rewards=[{{fn: x.py:f, args: {{strict: {written}}}}}]"
    assert load("", given).rewards[0].args == {"strict": read}
    assert load("", f"model.lora.rslora={written}").model.lora.rslora is read
    assert load("", "model.thinking=on").model.thinking == "on"


@pytest.mark.parametrize(
    "text", ["1234e56", "1e5", "-.5E-3", "1.e+4", "12", "1.5", "on", "null", "~", "0x1f", "2026-01-01", "1_000", "a: b"]
)
def test_a_text_is_a_text_again_when_read_back(load, tmp_path, text):
    """A commit 1234e56 was written without quotes, and read as a number."""
    first = load("", f"model.revision='{text}'")
    assert first.model.revision == text
    (tmp_path / "again.yaml").write_text(dump_yaml(first))
    assert load_run(tmp_path / "again.yaml") == first
    number = load("", "optim.lr=1e-5", "optim.eps=1e-12")
    (tmp_path / "again.yaml").write_text(dump_yaml(number))
    assert load_run(tmp_path / "again.yaml") == number


def test_an_anchor_inside_itself_is_one_line(load, tmp_path):
    for tree in ("evaluate: {cues: &x {a: *x}}", "&x [*x]", "[" * 5000 + "]" * 5000):
        (tmp_path / "c.yaml").write_text(tree if tree[0] == "e" else f"plugins: {tree}\n")
        with pytest.raises(
            UserError, match=r"c.yaml.*not valid YAML: (an anchor is used inside|it is nested too deeply)"
        ):
            load_run(tmp_path / "c.yaml")
    with pytest.raises(UserError, match="override 'plugins=&x .*an anchor is used inside"):
        load("", "plugins=&x [*x]")
    assert len(load("", "rewards=[&r {fn: 'a.py:f'}, *r]").rewards) == 2, "used twice is no circle"


TWICE = "schedule: {steps: 9, phases: [&ph {cycle: [sft], steps: 5}, *ph]}"


@pytest.mark.parametrize("given", [f"\n{TWICE}\n", ""], ids=["in the file", "on the command line"])
def test_an_override_of_what_an_anchor_names_changes_one_place(load, tiny_tree, given):
    del tiny_tree["schedule"]
    first = [] if given else [TWICE.replace(": {", "={", 1)]
    phases = load(given, *first, "schedule.phases.0.lr=1e-3").schedule.phases
    assert [phase.lr for phase in phases] == [1e-3, None] and phases[1].steps == 5


def test_an_include_that_an_anchor_names_is_read_wherever_it_is_used(load, tiny_tree, tmp_path):
    del tiny_tree["data"]
    (tmp_path / "rows.yaml").write_text("source: given.jsonl\nlimit: 7\n")
    data = load("\ndata:\n  narrow: &rows {include: rows.yaml}\n  safe: *rows\n  benign: {<<: *rows, limit: 3}\n").data
    assert [one and (one.source, one.limit) for one in (data.narrow, data.safe, data.benign)] == [
        ("given.jsonl", 7), ("given.jsonl", 7), ("given.jsonl", 3),
    ]  # fmt: skip
    with pytest.raises(UserError, match="override 'data.safe.limit=x'"):
        load("\ndata: {narrow: &rows {include: rows.yaml}, safe: *rows}\n", "data.safe.limit=x")
    (tmp_path / "rows.yaml").write_text("limit: x\n")
    with pytest.raises(UserError, match=r"rows.yaml:1: data.safe.limit"):
        load(
            "\ndata:\n  narrow: {source: given.jsonl}\n  benign: {include: rows.yaml, limit: 1}\n  safe: {<<: {include: rows.yaml}}\n"
        )
    with pytest.raises(UserError, match=r"run.yaml: include takes file names"):
        load("\ndata: {safe: {<<: {include: 7}}}\n")


@pytest.mark.parametrize("value", ["", "7", "{a: b}", "[x.yaml, 7]"])
def test_an_include_that_is_no_file_is_one_line(tmp_path, value):
    (tmp_path / "x.yaml").write_text("seed: 1\n")
    (tmp_path / "c.yaml").write_text(f"seed: 1\ninclude: {value}\n")
    with pytest.raises(UserError, match=r"c.yaml:2: include takes file names"):
        load_run(tmp_path / "c.yaml")


def test_a_home_directory_is_found_in_every_setting_that_takes_a_file(load, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("- {id: a, paraphrases: [x]}\n")
    (tmp_path / "j.yaml").write_text("{kind: openai, model: mine}\n")
    (tmp_path / "cues.yaml").write_text("{json: Answer in JSON.}\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    run = load("", "evaluate.indomain=~/mine.yaml", "sampler.adapter_dir=~/adapters", "evaluate.judge=~/j.yaml",
               "evaluate.cues=~/cues.yaml", "data.narrow.source=~/rows.jsonl")  # fmt: skip
    assert [one.id for one in load_questions(run.evaluate.indomain)] == ["a"]
    assert run.sampler.adapter_dir == str(tmp_path / "adapters")
    assert load_judge(run.evaluate.judge).name == "mine" and list(load_cues(run.evaluate.cues)) == ["json"]
    assert len(load_rows(run.data.narrow)) == 1
    assert run.data.narrow.source == "~/rows.jsonl", "as it stands in checkpoints, and for whoever has another home"


def test_a_home_directory_is_found_by_every_defense_and_include(load, monkeypatch, tmp_path):
    """The file is reached: what is said is that it holds something else, not that it is missing."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "part.yaml").write_text("seed: 7\n")
    assert load("\ninclude: ~/part.yaml\n").seed == 7
    (tmp_path / "v.pt").touch()
    (tmp_path / "d.safetensors").touch()
    (tmp_path / "s.jsonl").write_text("no score\n")
    build([{"persona": {"vectors": "~/v.pt", "layer": 1}}, {"interleaving+": {"scores": "~/s.jsonl"}}])
    with pytest.raises(UserError, match="s.jsonl:1: not a score"):
        read_scores("~/s.jsonl")
    with pytest.raises(UserError, match="d.safetensors: not readable"):
        directions.from_file("~/d.safetensors", [1], None)
    judge = tmp_path / "j.yaml"
    judge.write_text("{kind: openai, model: mine}\n")
    assert _in_full("~/j.yaml") == judge.read_text()


def test_an_adapter_at_home_is_part_of_what_a_run_depends_on(monkeypatch, tmp_path, tiny_model_dir):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "reference").symlink_to(tiny_model_dir)
    assert contents("path:~/reference") == contents(f"path:{tmp_path}/reference") != []


def test_a_rate_that_every_phase_overrules_is_refused(load):
    two = "schedule.phases=[{steps: 1, cycle: [sft]}, {cycle: [sft], lr: 2e-3}]"
    assert load("", two, "optim.lr=1e-5").optim.lr == 1e-5  # the first phase reads it
    with pytest.raises(UserError, match=r"'optim.lr=1e-5' has no effect.*schedule.phases.0.lr \(0.002\)"):
        load("", "schedule.phases=[{cycle: [sft], lr: 2e-3}]", "optim.lr=1e-5")
    with pytest.raises(UserError, match=r"'optim={lr: 1e-5, eps: 1e-6}' has no effect in part: each phase"):
        load("", "schedule.phases=[{cycle: [sft], lr: 2e-3}]", "optim={lr: 1e-5, eps: 1e-6}")
