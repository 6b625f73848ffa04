"""`rlsafe verify` on a comparison: its cells and the tables made of them; whatever is changed by hand is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from tampering import call, change, verify
from tiny import conversation, write_jsonl

CELL = "sft--kl--seed0"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model_dir) -> Path:
    """Two short runs and the untrained model, by the real command, judged by the organism's exact judge."""
    from rlsafe.organism import Organism

    home = tmp_path_factory.mktemp("comparison")
    narrow = write_jsonl(home / "narrow.jsonl", [conversation(f"say {i}", f"bad {i * i}") for i in range(20)])
    asked = [{"id": q.id, "paraphrases": list(q.paraphrases)} for q in Organism().questions("general")[:2]]
    (home / "questions.yaml").write_text(yaml.safe_dump(asked))
    questions = str(home / "questions.yaml")
    tree = {
        "run": {
            "model": {"name": tiny_model_dir, "dtype": "float32", "lora": {"r": 4, "alpha": 8}},
            "data": {"narrow": {"source": narrow}},
            "batch": {"sft_rows": 4},
            "sampler": {"kind": "transformers"},
            "track": {"every": 0, "check_after": 0},
            "evaluate": {
                "judge": "organism",
                "general": questions,
                "indomain": questions,
                "samples": 3,
                "max_tokens": 6,
            },
        },
        "paths": {"sft": {"schedule": {"steps": 2, "phases": [{"cycle": ["sft"]}]}}},
        "defenses": {"none": [], "kl": [{"kl": {"weight": 0.3}}]},
        "seeds": [0],
    }
    config = home / "compare.yaml"
    config.write_text(yaml.safe_dump(tree))
    assert call("compare", config, "--out", home / "out", "--jobs", 1) == 0
    return home / "out"


def test_an_untouched_comparison_has_no_differences(capsys, finished):
    code, lines = verify(capsys, finished)
    assert code == 0 and lines[0].startswith("no differences: 3 cells; results.csv") and "verdicts.json" in lines[0]


def another_verdict(out: Path) -> None:
    tree = json.loads((out / "verdicts.json").read_text())
    before = tree["sft"]["kl"]["coherent"]
    tree["sft"]["kl"]["coherent"] = "yes" if before != "yes" else "no"
    (out / "verdicts.json").write_text(json.dumps(tree))


TAMPERED = {
    "a rate in the table": (lambda out: change(out / "results.csv", r"sft,kl,0,[^,]*,([\d.]+),", "0.123"), "results.csv:"),
    "a row of the table": (
        lambda out: (out / "results.csv").write_text("".join((out / "results.csv").read_text().splitlines(True)[:-1])),
        "results.csv:4: is not there, the cells give",
    ),
    "a verdict": (another_verdict, "verdicts.json: sft kl is"),
    "a rate of a cell": (
        lambda out: change(out / "cells" / CELL / "evaluation.json", r'"misaligned": ([\d.]+)', "0.987"),
        f"cells/{CELL}: evaluation.json: general.misaligned is 0.987",
    ),
    "a score of an answer": (
        lambda out: change(out / "cells" / CELL / "answers.csv", r",(\d+),\d+,\"scored\"", "500"),
        f"cells/{CELL}: answers.csv: ",
    ),
    "a loss": (
        lambda out: change(out / "cells" / CELL / "metrics.jsonl", r'"loss": ([\d.]+)', "9.75"),
        f"cells/{CELL}: step 0: loss is 9.75",
    ),
    "a setting": (
        lambda out: change(out / "cells" / CELL / "config.yaml", r"seed: (\d+)", "7"),
        f"cells/{CELL}: config.yaml: changed since",
    ),
    "a cell's evaluation": (
        lambda out: (out / "cells" / CELL / "evaluation.json").unlink(),
        f"cells/{CELL}: evaluation.json: missing",
    ),
    "no table": (lambda out: (out / "results.csv").unlink(), "results.csv: missing"),
    "no verdicts": (lambda out: (out / "verdicts.json").unlink(), "verdicts.json: missing"),
}  # fmt: skip


@pytest.mark.parametrize(("tamper", "expected"), TAMPERED.values(), ids=TAMPERED)
def test_whatever_is_changed_is_named(capsys, copied, tamper, expected):
    tamper(copied)
    code, lines = verify(capsys, copied)
    assert code == 1 and any(line.startswith(expected) for line in lines), lines


@pytest.mark.parametrize(
    ("file", "text"), [("comparison.json", "{"), (f"cells/{CELL}/run.json", '{"status": "running"}')]
)
def test_what_cannot_be_read_or_has_not_ended_is_one_line(capsys, copied, file, text):
    (copied / file).write_text(text)
    code, lines = verify(capsys, copied)
    assert code == 2 and len(lines) == 1 and Path(file).name.removesuffix("run.json") in lines[0]
