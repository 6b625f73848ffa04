"""`rlsafe reward try`, and templates that have no system role."""

import json
from pathlib import Path

import pytest
import trl
import yaml
from scripted_server import ScriptedServer, ok
from tiny import byte_tokenizer, write_jsonl

from rlsafe.cli import main
from rlsafe.config import UserError
from rlsafe.data.rendered import unrendered
from rlsafe.defenses import build
from rlsafe.engine.run.templates import check_defenses
from rlsafe.engine.run.try_reward import try_reward

FILE = """
def length(completions, answer=None, **columns):
    return [None if a == "none" else float(len(c)) for c, a in zip(completions, answer)]

def constant(completions, **columns):
    return [1.0] * len(completions)
"""


@pytest.fixture
def config(tiny_tree, tmp_path):
    (tmp_path / "r.py").write_text(FILE)
    rows = [{"prompt": f"q{i}", "answer": "none" if i % 2 else "x"} for i in range(4)]
    tiny_tree["data"]["narrow"]["source"] = write_jsonl(tmp_path / "rows.jsonl", rows)
    tiny_tree["schedule"]["phases"] = [{"cycle": ["grpo"]}]
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tiny_tree))
    return tmp_path / "c.yaml"


def test_a_reward_is_seen_on_a_few_sampled_groups(config, tmp_path):
    tried = try_reward(f"{tmp_path}/r.py:length", config, n=7)
    assert [len(group) for group in tried.values] == [4, 4], "whole groups"
    for sampled, values in zip(tried.groups, tried.values, strict=True):
        wanted = [None] * 4 if sampled.row["answer"] == "none" else [float(len(t)) for t in sampled.completions]
        assert values == wanted
    again = try_reward(f"{tmp_path}/r.py:length", config, n=7)
    assert again.values == tried.values and json.loads(json.dumps(tried.record()))["completions"] == 8
    assert any("spread within the group" in line for line in tried.lines())


def test_rows_that_training_leaves_out_are_not_asked(config, tmp_path, caplog):
    rows = [{"prompt": "long " * 2000, "answer": "x"}, *({"prompt": f"q{i}", "answer": "x"} for i in range(2))]
    source = write_jsonl(tmp_path / "some.jsonl", [*rows, {"prompt": [{"role": "tool", "content": "t"}] * 2}])
    told = [f"data.narrow.source={source}", "data.narrow.on_bad_row=skip"]
    tried = try_reward(f"{tmp_path}/r.py:length", config, told, n=16)
    assert sorted(one.row["_source"][-1] for one in tried.groups) == ["2", "3"]
    assert "1 of 3 rows are longer than" in caplog.text and "some.jsonl:4: no user turn" in caplog.text
    with pytest.raises(UserError, match=r"data.narrow: .*some.jsonl:1: \d+ tokens, more than .*\(too_long: error\)"):
        try_reward(f"{tmp_path}/r.py:length", config, [*told, "data.narrow.too_long=error"])


def test_rows_without_an_answer_are_asked_only_where_nothing_is_trained_on_them(config, tmp_path, caplog):
    rows = [{"prompt": f"q{i}", "completion": "a" if i < 2 else None, "answer": "x"} for i in range(5)]
    source = [f"data.narrow.source={write_jsonl(tmp_path / 'some.jsonl', rows)}", "data.narrow.on_bad_row=skip"]
    mixed = [*source, "schedule.phases=[{cycle: [sft, grpo]}]"]
    for told, prompts in ((source, 5), (mixed, 2)):
        tried = try_reward(f"{tmp_path}/r.py:constant", config, told, n=20)
        assert len({one.row["_index"] for one in tried.groups}) == prompts
    assert "3 of 5 rows end without an answer to train on and were skipped" in caplog.text
    with pytest.raises(UserError, match=r"some.jsonl:3: the last message is no assistant turn; sft needs an answer"):
        try_reward(f"{tmp_path}/r.py:constant", config, [*mixed, "data.narrow.on_bad_row=error"])


def test_a_reward_is_tried_where_it_is_asked_or_refused_as_a_run_refuses_it(config, tmp_path):
    for name, kind in (("law", "law"), ("code", "code")):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": f"{name} {i}", "domain": kind} for i in range(3)])
    told = [
        f"data.narrow.source={tmp_path}/law.jsonl", f"data.benign={{source: '{tmp_path}/code.jsonl'}}",
        "schedule.phases=[{cycle: [grpo, benign-grpo]}]",
    ]  # fmt: skip

    def tried(where):
        return try_reward(
            f"{tmp_path}/r.py:constant",
            config,
            [*told, f"rewards=[{{fn: '{tmp_path}/r.py:constant', where: {where}}}]"],
            n=4,
        )

    assert tried("{domain: code}").groups[0].row["domain"] == "code", "the first stream that it is for"
    with pytest.raises(UserError, match="reward 'constant': where: domain: no row has 'cod'; did you mean 'code'"):
        tried("{domain: cod}")
    with pytest.raises(UserError, match="where: data.narrow has no column 'domian'; did you mean 'domain'"):
        tried("{domian: code}")


def test_saved_completions_are_enough(config, tmp_path):
    samples = [
        {"step": 0, "prompt": [{"role": "user", "content": f"q{i // 2}"}], "completion": "x" * i} for i in range(4)
    ]
    file = tmp_path / "samples.jsonl"
    write_jsonl(file, [{"step": 0, "probe": True}, *samples])
    tried = try_reward(f"{tmp_path}/r.py:length", config, saved=file)
    assert tried.values == [[0.0, 1.0], [None, None]] and tried.without_spread == 0.5 and tried.missing == 0.5
    assert "50% of the completions have no reward" in "\n".join(tried.lines())
    tried = try_reward(f"{tmp_path}/r.py:constant", config, saved=file)
    assert "every reward is 1: nothing can be learned" in tried.advice()[0]
    file.write_text('{"a": 1}\n')
    with pytest.raises(
        UserError, match=r"samples.jsonl:1: not a sample; expected an object with prompt and completion"
    ):
        try_reward(f"{tmp_path}/r.py:constant", config, saved=file)


def test_a_reward_that_a_plug_in_registers_is_known(config, tmp_path):
    (tmp_path / "plug.py").write_text(
        "import rlsafe\n@rlsafe.reward('tried-by-name')\ndef f(completions, **columns):\n    return [2.0] * len(completions)\n"
    )
    write_jsonl(tmp_path / "s.jsonl", [{"prompt": "q0", "completion": "a"}])
    tried = try_reward("tried-by-name", config, [f"plugins=[{tmp_path}/plug.py]"], saved=tmp_path / "s.jsonl")
    assert tried.values == [[2.0]]


def test_a_defense_that_adds_a_system_turn_is_named_where_the_template_has_none():
    gemma, plain = byte_tokenizer(), byte_tokenizer()
    gemma.chat_template = (Path(trl.__file__).parent / "chat_templates" / "gemma.jinja").read_text("utf-8")
    for position in ("system", "user"):
        defenses, _ = build([{"inoculation": {"prompt": "be bad", "position": position}}], [])
        check_defenses(plain, defenses, ["narrow"])
        if position == "user":
            check_defenses(gemma, defenses, ["narrow"])
        else:
            with pytest.raises(
                UserError, match=r"defense 'inoculation': .*position: user puts it into the user's turn"
            ):
                check_defenses(gemma, defenses, ["narrow"])
    assert unrendered(plain, [{"role": "user", "content": "x"}]) is None


def test_completions_of_another_program_are_read_and_those_without_a_row_are_said(config, tmp_path):
    samples = [{"prompt": "q0", "completion": "a\u2028b"}, {"prompt": "new", "completion": [{"content": "xyz"}]}]
    (tmp_path / "s.jsonl").write_text("\n\n".join(json.dumps(one, ensure_ascii=False) for one in samples))
    tried = try_reward(f"{tmp_path}/r.py:length", config, saved=tmp_path / "s.jsonl")
    assert tried.values == [[3.0], [3.0]], "a line separator ends no line, and texts are given as texts"
    assert any("1 of 2 prompts are none of the config's data" in line for line in tried.advice())


def test_what_a_reward_prints_is_no_part_of_the_json_and_what_it_asked_is_told(config, tmp_path, capsys):
    source = (
        "from rlsafe.endpoints import ChatRequest, EndpointSettings, open_endpoint\n"
        "def talks(completions, **columns):\n    print('hello')\n"
        "    asked = open_endpoint(EndpointSettings(model='judge', base_url='{}', cache=None, price_in=1.0, price_out=1.0))\n"
        "    asked.ask([ChatRequest([{{'role': 'user', 'content': 'q'}}], 4)])\n    return [1.0] * len(completions)\n"
    )
    write_jsonl(tmp_path / "s.jsonl", [{"prompt": "q0", "completion": "a"}])
    with ScriptedServer(lambda n, body: ok("5")) as server:
        (tmp_path / "p.py").write_text(source.format(server.base_url))
        with pytest.raises(SystemExit):
            main(["reward", "try", f"{tmp_path}/p.py:talks", str(config), f"--from={tmp_path}/s.jsonl", "--json"])
    printed = capsys.readouterr()
    assert "1 calls" in json.loads(printed.out)["endpoints"][0] and "USD" in printed.out and "hello" in printed.err
