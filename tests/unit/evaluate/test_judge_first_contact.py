"""An endpoint that is not there when a command begins is the user's mistake, told at once; an outage later is not."""

import socket
import time

import pytest
import yaml
from scripted_server import ScriptedServer, error, ok

from rlsafe.cli import main
from rlsafe.config import UserError
from rlsafe.evaluate import load_judge
from rlsafe.types import Exchange

pytestmark = pytest.mark.usefixtures("no_waiting")
RUN = {
    "model": {"name": "organism:aligned", "dtype": "float32"},
    "sampler": {"kind": "transformers"},
    "data": {"narrow": {"source": "organism:medical/bad"}},
    "evaluate": {"general": "organism:general"},
}


@pytest.fixture
def nowhere():
    """The address of a port that nobody listens on."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{held.getsockname()[1]}/v1"


def write(path, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({**RUN, **more}))
    return str(path)


def fails(capsys, *arguments):
    """The one line that the command ends with, by exit code 2 and within a few seconds of its own work."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 2 and len(lines) == 1
    return lines[0]


def judge(base_url, **more):
    return load_judge({"kind": "openai", "model": "judge", "base_url": base_url, "cache": None, **more})


def test_evaluate_says_at_once_that_nobody_is_there(tmp_path, nowhere, capsys):
    write(tmp_path / "run" / "config.yaml")  # has no adapter: that is looked for after the judge
    begun = time.monotonic()
    said = fails(capsys, "evaluate", str(tmp_path / "run"), "--judge", f"openai:m@{nowhere}")
    assert time.monotonic() - begun < 120 and "evaluate.judge: 'm' at http://127.0.0.1" in said and "on_outage" in said
    assert not list((tmp_path / "run").glob("*answers*"))


def test_train_and_compare_say_it_before_they_train(tmp_path, nowhere, capsys):
    asked = {"kind": "openai", "model": "m", "base_url": nowhere}
    run = {"evaluate": {**RUN["evaluate"], "judge": asked}, "schedule": {"steps": 1}}
    said = fails(capsys, "train", write(tmp_path / "run.yaml", **run), "--out", str(tmp_path / "run"))
    assert "evaluate.judge: 'm' at" in said and not (tmp_path / "run").exists()
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump({"run": {**RUN, **run}, "paths": {"sft": {}}, "seeds": [0]}))
    said = fails(capsys, "compare", str(tmp_path / "compare.yaml"), "--out", str(tmp_path / "grid"))
    assert "evaluate.judge: 'm' at" in said and not list((tmp_path / "grid").glob("cells/*"))


def test_train_says_that_a_rewards_grader_is_not_there(tmp_path, nowhere, capsys):
    schedule = {"steps": 1, "phases": [{"cycle": ["grpo"]}]}
    config = write(tmp_path / "run.yaml", rewards=[graded(nowhere)], schedule=schedule, evaluate={})
    said = fails(capsys, "train", config, "--out", str(tmp_path / "run"))
    assert "its grader 'grader' at http://127.0.0.1" in said and not (tmp_path / "run").exists()


def graded(nowhere):
    return {"fn": "reward_fns/advice.py:bad_medical", "args": {"endpoint": {"model": "grader", "base_url": nowhere}}}


def test_a_grader_that_is_part_of_a_mixture_is_asked_for_too(tmp_path, nowhere, capsys):
    inner = {"fn": "reward_fns/mixture.py:Mixture", "args": {"parts": [{**graded(nowhere), "weight": {0: 0, 9: 1}}]}}
    outer = {"fn": "reward_fns/mixture.py:Mixture", "args": {"parts": [{"fn": "reward_fns/length.py:near"}, inner]}}
    schedule = {"steps": 1, "phases": [{"cycle": ["grpo"]}]}
    config = write(tmp_path / "run.yaml", rewards=[outer], schedule=schedule, evaluate={})
    said = fails(capsys, "train", config, "--out", str(tmp_path / "run"))
    assert "its grader 'grader' at http://127.0.0.1" in said and not (tmp_path / "run").exists()


def test_persona_vector_says_it_before_it_samples(tmp_path, nowhere, capsys):
    asked = {"kind": "openai", "model": "m", "base_url": nowhere}
    tree = {"pairs": [{"evil": "a", "friendly": "b"}], "questions": ["how?"], "judge": asked}
    (tmp_path / "vector.yaml").write_text(yaml.safe_dump(tree))
    missing = str(tmp_path / "model")  # a model that does not load: it is looked for after the judge
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    said = fails(capsys, "persona-vector", missing, "--config", str(tmp_path / "vector.yaml"))
    assert "evaluate.judge: 'm' at" in said


def test_select_asks_for_the_graders_of_its_helpers(tmp_path, nowhere, capsys):
    run = {**RUN, "rewards": [graded(nowhere)], "schedule": {"steps": 1, "phases": [{"cycle": ["grpo"]}]}}
    run = {**run, "data": {**RUN["data"], "safe": {"source": "organism:safe"}}, "evaluate": {}}
    selection = {"adapters": {"legal": "organism:legal/bad"}}
    tree = {"run": run, "paths": {"sft": {}}, "seeds": [0], "selection": selection}
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(tree))
    said = fails(capsys, "select", str(tmp_path / "compare.yaml"), "--out", str(tmp_path / "selection"))
    assert "selection.adapters.legal: reward 'bad_medical': its grader" in said
    assert not list(tmp_path.glob("selection/**/run.json"))


def test_the_judge_of_a_data_defense_alone_is_asked_for(tmp_path, nowhere, capsys):
    asked = {"judge": {"kind": "openai", "model": "m", "base_url": nowhere}}
    data = {**RUN["data"], "safe": {"source": "organism:safe"}}
    config = write(tmp_path / "run.yaml", evaluate=asked, defenses=["interleaving-onpolicy"], data=data)
    said = fails(capsys, "train", config, "--out", str(tmp_path / "run"))
    assert "evaluate.judge: 'm' at" in said and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "status, said",
    [(401, "HTTP 401: .*no such key"), (404, "HTTP 404: .*no such key"), (400, "HTTP 400: .*no such key")],
)
def test_a_key_or_a_model_that_is_refused_is_told(status, said):
    with ScriptedServer(lambda n, body: error(status, "no such key")) as server:
        with pytest.raises(UserError, match=said):
            judge(server.base_url, protocol="number", on_outage="pause").check(first=True)


def test_a_host_that_nobody_knows_is_told():
    with pytest.raises(UserError, match=r"'judge' at http://nobody\.invalid/v1: Connection error"):
        judge("http://nobody.invalid/v1").check(first=True)


def test_saved_replies_do_not_hide_that_nobody_is_there(tmp_path):
    with ScriptedServer(lambda n, body: ok("80", top={"80": 0.0})) as server:
        judge(server.base_url, cache=str(tmp_path), concurrency=2).check()
    again = judge(server.base_url, cache=str(tmp_path), concurrency=3)  # another client of the same address
    again.check()
    with pytest.raises(UserError, match="Connection error"):
        again.check(first=True)


def test_a_connection_that_fails_once_is_tried_again_and_tells_the_protocol():
    def script(n, body):
        return (200, {"Content-Length": "9"}, b"") if n == 0 else ok("80", top={"80": 0.0})

    with ScriptedServer(script) as server:
        made = judge(server.base_url, backoff=0.01)
        made.check(first=True)
        made.check()  # nobody needs to be asked again
        made.check(first=True)
        assert len(server.requests) == 2 and made.usage()["protocol"] == "number"


def test_a_pause_waits_for_a_judge_that_is_not_there_yet(nowhere, caplog):
    judge(nowhere, on_outage="pause").check(first=True)
    assert "waiting for it once there are answers" in caplog.text


def test_an_outage_after_the_first_contact_leaves_scores_out():
    with ScriptedServer(lambda n, body: ok("80", top={"80": 0.0})) as server:
        made = judge(server.base_url, max_retries=1, backoff=0.01)
        made.check(first=True)
    made.check()
    assert [one.outcome for one in made.score([Exchange("a question", "an answer")])] == ["unscored"]


@pytest.mark.parametrize("answer", [error(503), error(429)])
def test_a_fault_that_may_pass_is_left_to_the_retries(answer):
    with ScriptedServer(lambda n, body: answer) as server:
        judge(server.base_url).check(first=True)
    assert len(server.requests) == 1
