"""Dropout and GRPO: ratio, sampler gap and correction compare forwards of one policy, so no random masks may lie between them."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from safetensors.torch import save_file

from rlsafe import cli
from rlsafe.config import UserError, load_compare, run_from_tree
from rlsafe.engine.run.build import prepare


def stopped(capsys, *arguments: str) -> tuple[int, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    return stop.value.code, capsys.readouterr().err


@pytest.mark.parametrize("phase", ["cycle: [sft, grpo]", "mix: {sft: 1, grpo: 1}", "cycle: [both]"])
def test_dropout_with_grpo_steps_is_refused_with_its_line(capsys, tiny_tree, tmp_path, phase):
    tiny_tree["model"]["lora"]["dropout"] = 0.3
    tiny_tree["schedule"] = {
        "steps": 4,
        "phases": [yaml.safe_load(f"{{{phase}}}")],
        "kinds": {"both": [{"path": "sft"}, {"path": "grpo"}]},
    }
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(tiny_tree, sort_keys=False))
    line = next(n for n, text in enumerate(config.read_text().splitlines(), 1) if "dropout" in text)
    code, error = stopped(capsys, "train", str(config), "--dry-run")
    assert (code, error) == (
        2, f"error: {config}:{line}: model.lora.dropout: must be 0 when the schedule has GRPO steps, got 0.3\n",
    )  # fmt: skip


def test_dropout_is_free_where_no_phase_has_grpo_steps(tiny_tree):
    tiny_tree["model"]["lora"]["dropout"] = 0.3
    tiny_tree["schedule"]["kinds"] = {"unused": [{"path": "grpo"}]}
    assert run_from_tree(tiny_tree).model.lora.dropout == 0.3


def test_a_comparison_names_it_before_any_cell(tiny_tree, tmp_path):
    from rlsafe.compare.grid.grid import expand

    tiny_tree["model"]["lora"]["dropout"] = 0.3
    paths = {name: {"schedule": {"phases": [{"cycle": [name]}]}} for name in ("sft", "grpo")}
    config = tmp_path / "compare.yaml"
    config.write_text(yaml.safe_dump({"run": tiny_tree, "paths": paths}))
    assert expand(load_compare(config), None, ["sft"], [0])
    with pytest.raises(UserError, match=r"compare.yaml:\d+: model.lora.dropout: must be 0"):
        expand(load_compare(config), None, ["sft", "grpo"], [0])


@pytest.mark.parametrize(
    ("kind", "dropout", "refused"), [("grpo", 0.1, True), ("grpo", 0.0, False), ("sft", 0.1, False)]
)
def test_an_adapter_to_go_on_with_is_held_to_the_same(tiny_tree, tmp_path, kind, dropout, refused):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_dropout": dropout}))
    save_file({"base_model.model.x.lora_A.weight": torch.zeros(1, 1)}, str(adapter / "adapter_model.safetensors"))
    tiny_tree["model"]["adapter"] = str(adapter)
    tiny_tree["schedule"]["phases"] = [{"cycle": [kind]}]
    if refused:
        with pytest.raises(
            UserError, match="model.adapter: .*lora_dropout in its adapter_config.json is 0.1; must be 0"
        ):
            prepare(run_from_tree(tiny_tree))
    else:
        prepare(run_from_tree(tiny_tree))
