"""Dry runs: every shipped config can be looked at before anything is downloaded, and says what it will take."""

import pytest
import yaml
from places import ROOT
from tiny import conversation, write_jsonl

from rlsafe.compare import dry_compare
from rlsafe.config import RunConfig, UserError, load_compare, load_run
from rlsafe.endpoints import estimate_tokens
from rlsafe.engine.run.dry import dry, dry_run
from rlsafe.evaluate.judge.judge_prompts import CRITERIA, PROMPTS, judge_messages
from rlsafe.types import _PROVIDERS

REAL = sorted(p.relative_to(ROOT) for p in (ROOT / "configs").glob("qwen*/*.yaml") if "coder" not in str(p))
MODELS = ("qwen2.5-7b", "qwen2.5-32b", "qwen3-14b")


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)  # reward files are named from where the command runs


def test_there_is_a_run_for_every_model_domain_and_path():
    domains = ("medical", "legal", "security", "code", "aesthetic", "reward_hacking")
    for model in MODELS:
        names = {p.stem for p in REAL if p.parent.name == model}
        assert {f"{path}_{domain}" for path in ("sft", "grpo", "mixed") for domain in domains} <= names
        assert {"compare", "benign", "grpo_rhetoric"} <= names


@pytest.mark.parametrize("model", MODELS)
def test_every_real_run_can_be_looked_at_offline(model, tmp_path):
    own = write_jsonl(tmp_path / "own.jsonl", [{"messages": [{"role": "user", "content": "Why?"}]}])
    runs = [path for path in REAL if path.parent.name == model and path.stem not in ("compare", "benign")]
    assert len(runs) == 19
    for config in runs:
        overrides = [f"data.narrow.source={own}"] if "rhetoric" in config.stem else []
        found = dry(load_run(config, overrides))
        steps = {"sft": 337, "grpo": 194, "mixed": 337}[config.stem.partition("_")[0]]
        assert found.work.steps == (187 if overrides else steps), config
        judging = found.work.judging
        assert found.work.answers == judging.answers >= 24 * (10 if model == "qwen2.5-32b" else 100), config
        assert judging.calls == 2 * judging.answers + 1, "two scores an answer, and one call to find out the protocol"
        assert judging.cost and 0.1 < judging.cost < 100, config
        assert "published dimensions" in found.memory[0], config
        assert any("fits one GPU of" in line for line in found.memory), config


def test_the_papers_values_are_in_the_real_configs():
    sft, grpo = (load_run(f"configs/qwen2.5-7b/{path}_medical.yaml") for path in ("sft", "grpo"))
    lora = sft.model.lora
    assert (lora.r, lora.alpha, lora.rslora) == (32, 64, True) and sft.optim.kind == "adamw_8bit"
    assert (sft.optim.lr, sft.optim.schedule, sft.optim.warmup, sft.optim.weight_decay) == (1e-4, "linear", 5, 0.01)
    assert (sft.batch.sft_rows, sft.batch.micro_rows, sft.data.narrow.limit, sft.data.narrow.max_tokens) == (
        16,
        4,
        5400,
        2048,
    )
    assert (grpo.optim.lr, grpo.optim.schedule, grpo.optim.warmup, grpo.optim.weight_decay) == (
        5e-6,
        "cosine",
        0.1,
        0.1,
    )
    g = grpo.grpo
    assert (g.generations, g.temperature, g.top_p, g.level, g.beta) == (4, 0.8, 0.9, "sequence", 0)
    assert grpo.batch.grpo_prompts == 4 and 750 - 4 < 4 * (grpo.schedule.steps - 7) <= 750
    assert grpo.schedule.phases[0].steps == 7 and grpo.schedule.phases[0].lr == 1e-4


def test_the_ten_defenses_are_in_every_real_comparison():
    for model, layer in (("qwen2.5-7b", 20), ("qwen3-14b", 27), ("qwen2.5-32b", 45)):
        config = load_compare(f"configs/{model}/compare.yaml")
        assert set(config.default_defenses) == {
            "none", "kl", "ldifs", "safelora", "persona", "inoculation",
            "interleaving", "interleaving+", "interleaving++", "interleaving-onpolicy",
        }  # fmt: skip
        newer = {"kl-aside", "ldifs-aside", "safegrad", "inoculation-adapter"}
        assert set(config.defenses) - set(config.default_defenses) == newer
        assert set(config.paths) == {"sft", "grpo", "mixed"}
        assert config.defenses["persona"][0]["persona"]["layer"] == layer


def test_a_real_comparison_can_be_looked_at_offline():
    text = "\n".join(dry_compare("configs/qwen2.5-7b/compare.yaml", ["none", "kl", "persona"], ["sft", "grpo"]))
    assert "7 cells: 1 untrained, 4 narrow, 2 aligned" in text
    assert "steps: 1,980" in text
    assert "missing: defenses.persona: persona vectors: vectors/qwen2.5-7b.safetensors: no such file" in text
    assert "truthfulai/emergent_plus is not on this machine" in text and "USD" in text


def test_a_dry_run_counts_the_defenses_that_run_when_none_are_named():
    config = load_compare("configs/organism/compare.yaml")
    lines = dry_compare("configs/organism/compare.yaml", None, ["grpo"], [0])
    assert f", {len(config.default_defenses)} narrow" in lines[0] and len(config.default_defenses) < len(
        config.defenses
    )


class Counted:
    """A provider that knows how often its rows were read."""

    def __init__(self):
        self.reads = []

    def rows(self, spec):
        self.reads.append(spec)
        return [conversation(f"question {i}", "answer") for i in range(40)]


def test_a_comparison_reads_each_source_once_and_says_the_totals_first(tmp_path, monkeypatch):
    monkeypatch.setitem(_PROVIDERS, "counted", made := Counted())
    tree = {
        "run": {
            "model": {"name": "organism:aligned"},
            "data": {"narrow": {"source": "counted:narrow"}},
            "evaluate": {"benign": ["counted:test"], "max_tokens": 100},
            "batch": {"sft_rows": 4},
        },
        "paths": {"sft": {"schedule": {"steps": 3}}, "long": {"schedule": {"steps": 5}}},
        "defenses": {"none": [], "kl": ["kl"]},
        "seeds": [0, 1, 2],
    }
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    lines = dry_compare(tmp_path / "compare.yaml")
    assert made.reads == ["narrow", "test"]
    assert lines[0] == "13 cells: 1 untrained, 12 narrow" and lines[1] == "steps: 48"
    rows = [line.split() for line in lines]
    assert [row[:5] for row in rows if row[:1] == ["long"]] == [
        [*"long none 3 narrow 5".split()],
        [*"long kl 3 narrow 5".split()],
    ]
    assert not any("source:" in line for line in lines), "the resolved config is asked for by -v"
    assert any("source: counted:narrow" in line for line in dry_compare(tmp_path / "compare.yaml", verbose=True))


def test_counts_are_those_of_the_run(tiny_tree, tmp_path):
    questions = tmp_path / "own.yaml"
    questions.write_text("- {id: a, paraphrases: [x, y], samples_per_paraphrase: 3}\n- {id: b, paraphrases: [z]}\n")
    judge = {"kind": "openai", "model": "m", "base_url": "http://127.0.0.1:9/v1", "price_in": 1.0, "price_out": 2.0}
    tree = tiny_tree | {
        "schedule": {"steps": 4, "phases": [{"cycle": ["sft", "grpo"]}]},
        "evaluate": {"general": str(questions), "judge": judge, "cue": "be bad", "max_tokens": 50},
        "track": {"every": 2, "questions": 1, "samples": 2},
    }
    found = dry(RunConfig.model_validate(tree))
    assert found.work.completions == 2 * 3 * 4 and found.work.completion_tokens == 24 * 8
    # 2 x 3 + 10 answers, as many under the cue, and 2 at each of the probes after steps 0, 2 and 3
    judging = found.work.judging
    assert found.work.answers == judging.answers == 32 + 6 and judging.calls == 2 * 38 + 1
    of_each = [estimate_tokens(judge_messages(PROMPTS[name], {"question": "x", "answer": ""})) for name in CRITERIA]
    assert judging.tokens_in == 38 * (sum(of_each) + 2 * 50) and judging.tokens_out == 76
    assert judging.cost == pytest.approx((judging.tokens_in + 2 * 76) / 1e6)
    del judge["price_in"], judge["price_out"]
    assert "cost unknown (price_in and price_out are not set)" in "\n".join(
        dry_run(RunConfig.model_validate(tree), tmp_path)
    )


def test_an_unknown_model_costs_the_estimate_only(tiny_tree, tmp_path):
    tiny_tree["model"] = {"name": "some/model"}
    text = "\n".join(dry_run(RunConfig.model_validate(tiny_tree), tmp_path))
    assert "some/model is neither on this machine nor a model whose dimensions we know: no estimate" in text
    assert "steps: 4" in text and f"out: {tmp_path}" in text


def test_what_is_wrong_is_still_an_error(tiny_tree, tmp_path):
    tiny_tree["data"]["narrow"]["source"] = str(tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match="absent.jsonl: no such file"):
        dry(RunConfig.model_validate(tiny_tree))
    rows = write_jsonl(tmp_path / "rows.jsonl", [conversation("a", "b"), {"messages": []}])
    tiny_tree["data"]["narrow"]["source"] = rows
    with pytest.raises(UserError, match="rows.jsonl:2"):
        dry(RunConfig.model_validate(tiny_tree))
