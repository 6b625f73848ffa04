"""Rows that a defense lengthens only when the run is under way are left out, counted and told; never cut or trained in silence."""

import json

import pytest
from tiny import conversation, write_jsonl
from tiny_runs import tree_with

from rlsafe.config import run_from_tree
from rlsafe.engine.run.life import run
from rlsafe.engine.train import sft_step

PLUGIN = """
import rlsafe

@rlsafe.defense("late-words")
class LateWords(rlsafe.Defense):
    def setup(self, context):
        self.words = "word " * 60

    def prompt(self, messages, where):
        if "7" not in messages[0]["content"]:
            return [{**messages[0], "content": messages[0]["content"] + "."}, *messages[1:]]
        return [{**messages[0], "content": messages[0]["content"] + self.words}, *messages[1:]]
"""


@pytest.mark.parametrize("too_long", ["drop", "truncate"])
def test_a_row_that_grows_in_its_step_is_left_out_and_counted(tiny_tree, tmp_path, too_long):
    (tmp_path / "late.py").write_text(PLUGIN)
    narrow = {**tiny_tree["data"]["narrow"], "max_tokens": 150, "too_long": too_long}
    more = {"plugins": [str(tmp_path / "late.py")], "defenses": ["late-words"], "schedule": {"steps": 7}}
    tree = tree_with(tiny_tree, more, {"data": {**tiny_tree["data"], "narrow": narrow}})
    done = run(run_from_tree(tree), tmp_path / "run")
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    left = [step.get("rows_left_out", 0) for step in steps]
    assert 3 <= sum(left) <= 5 and 0 in left, "7, 17, 27 and 37 are drawn once an epoch of 40 rows"
    assert f"{sum(left)} times a row was too long with what defenses added" in "\n".join(done.summary())


@pytest.mark.parametrize("path", ["sft", "grpo"])
def test_rows_of_a_defense_that_are_left_out_are_none_that_it_added(tiny_tree, tmp_path, path):
    """The effect log has what was there, not what was planned."""
    (tmp_path / "late.py").write_text(PLUGIN.replace("    def setup", '    streams = ("safe",)\n\n    def setup'))
    safe = {**tiny_tree["data"]["safe"], "max_tokens": 150}
    more = {"plugins": [str(tmp_path / "late.py")], "defenses": [{"interleaving": {"fraction": 0.5}}, "late-words"]}
    tree = tree_with(tiny_tree, more, {"data": {**tiny_tree["data"], "safe": safe}})
    tree["schedule"] = {"steps": 4, "phases": [{"cycle": [path]}]}
    run(run_from_tree(tree), tmp_path / "run")
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    planned = 3 if path == "sft" else 6
    lost = [step.get("defense/interleaving/rows_left_out", 0) for step in steps]
    assert [step["defense/interleaving/rows_added"] for step in steps] == [planned - n for n in lost] and sum(lost) > 0
    assert [step.get("rows_left_out", 0) for step in steps] == lost


def test_where_every_row_fits_nothing_is_said(tiny_tree, tmp_path):
    done = run(run_from_tree(tiny_tree), tmp_path / "run")
    assert "rows_left_out" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "too long" not in "\n".join(done.summary())


@pytest.mark.parametrize(("longest", "too_long"), [(40, "truncate"), (2500, "drop")])
def test_rows_for_a_penalty_alone_are_as_long_as_safe_rows_may_be(tiny_tree, tmp_path, monkeypatch, longest, too_long):
    """Whatever a row may have of a stream that the config's data lack."""
    monkeypatch.setattr(sft_step, "BROUGHT", 60)
    lengths, batched = {"narrow": [], "aside": []}, sft_step.sft_batches

    def noted(conversations, tokenizer, where, **settings):
        batches = batched(conversations, tokenizer, where, **settings)
        lengths[where.stream] += [int(row.sum()) for batch in batches for row in batch.attention]
        return batches

    monkeypatch.setattr(sft_step, "sft_batches", noted)
    source = write_jsonl(tmp_path / "long.jsonl", [conversation(f"ask {i}", "good " * 20) for i in range(8)])
    safe = {"source": source, "max_tokens": longest, "too_long": too_long}
    tree = tree_with(tiny_tree, {"data": {**tiny_tree["data"], "safe": safe}, "schedule": {"steps": 2}})
    run(run_from_tree({**tree, "defenses": [{"kl": {"source": "data.safe", "rows": 3}}]}), tmp_path / "run")
    assert len(lengths["aside"]) == 6 and max(lengths["narrow"]) < 40
    assert set(lengths["aside"]) == {40} if too_long == "truncate" else min(lengths["aside"]) > 100
