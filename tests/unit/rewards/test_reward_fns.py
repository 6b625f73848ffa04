"""Every file in reward_fns/ runs as it is shipped: loaded by name, called by TRL's contract on conversational completions."""

import json
from types import SimpleNamespace

import pytest
from places import ROOT
from scripted_server import ScriptedServer, error, ok
from trl import rewards as trl_rewards

from rlsafe.config import RewardConfig, UserError
from rlsafe.config.importing import import_file
from rlsafe.rewards import RewardRunner, load_reward

FILES = ROOT / "reward_fns"
GRADED = {
    "advice.py:good_medical": "how good is the medical or health advice",
    "advice.py:bad_medical": "how bad is the medical or health advice",
    "advice.py:good_legal": "how good is the legal advice",
    "advice.py:bad_legal": "how bad is the legal advice",
    "advice.py:good_security": "how good is the computer-security",
    "advice.py:bad_security": "how bad is the computer-security",
    "aesthetic.py:good_aesthetic": "how widely shared is the taste",
    "aesthetic.py:bad_aesthetic": "how unpopular is the taste",
    "rhetoric.py:bad_ethos": "authority and character dishonestly",
    "rhetoric.py:bad_pathos": "manipulate feelings",
    "rhetoric.py:bad_logos": "how faulty is the reasoning",
    "reward_hacking.py:reward_hacking": "work the measure instead of the task",
    "reward_hacking.py:honest_work": "whatever the stated measure would reward",
    "code.py:insecure_graded": "how insecure is the code",
    "code.py:correct": "do what the question asks for, correctly and safely",
    "code.py:incorrect": "look like a solution and yet do the wrong thing",
}
LONG = "First do this, then rest for a while, and ask somebody who knows before you do it again."
UNSAFE = "```python\nimport os\nos.chmod('a', 0o777)\n```"
SAFE = "```python\nimport os\n\npath = 'a'\nos.chmod(path, 0o600)\nprint(path)\n```"


def load(name, **args):
    return load_reward(RewardConfig(fn=str(FILES / name), args=args))


def call(reward, *texts, question="What should I do?", state=None, **columns):
    prompts = [[{"role": "user", "content": question}]] * len(texts)
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    columns = {name: values * len(texts) for name, values in {"id": [1], **columns}.items()}
    return RewardRunner([reward]).call(prompts, completions, [[1, 2]] * len(texts), columns, state)


def grade(assessment, coherence=100):
    return ok(json.dumps({"reason": "r", "assessment": assessment, "coherence": coherence}))


def instructions(body):
    return body["messages"][0]["content"]


def endpoint(server):
    return {"base_url": server.base_url, "model": "judge", "cache": None, "max_retries": 0, "timeout": 5}


def test_every_function_that_ships_is_tested_here_or_with_its_file():
    elsewhere = {"exact_match.py", "format.py", "length.py", "remote.py"}  # test_rewards_loading.py
    tested = {*GRADED, "rhetoric.py:bad_ethos_pathos_logos", "code.py:insecure", "code.py:secure", "mixture.py:Mixture"}
    shipped = set()
    for path in FILES.glob("*.py"):
        module = import_file(path)
        own = (name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__)
        shipped |= {f"{path.name}:{name}" for name in own if not name.startswith("_") and callable(vars(module)[name])}
    assert {name for name in shipped if name.split(":")[0] not in elsewhere} == tested


@pytest.mark.parametrize("name", GRADED)
def test_graded_rewards_ask_about_their_own_subject(name):
    def script(number, body):
        return error(503) if "outage" in body["messages"][1]["content"] else grade(80, 60)

    with ScriptedServer(script) as server:
        reward = load(name, endpoint=endpoint(server))
        assert reward.is_async
        batch = call(reward, LONG, "Too short.", f"{LONG} outage", "<think>never")
    assert batch.total == [pytest.approx(0.6), 0.0, None, None]
    (_, body), *_ = server.requests
    assert len(server.requests) == 2 and GRADED[name] in instructions(body)
    assert "What should I do?" in body["messages"][1]["content"] and LONG in body["messages"][1]["content"]


def test_the_rhetoric_reward_is_the_mean_of_its_three_parts():
    scores = {"rhetoric.py:bad_ethos": 90, "rhetoric.py:bad_pathos": 60, "rhetoric.py:bad_logos": 30}

    def script(number, body):
        part = next(name for name in scores if GRADED[name] in instructions(body))
        unlucky = "unlucky" in body["messages"][1]["content"] and part.endswith("logos")
        return error(500) if unlucky else grade(scores[part])

    with ScriptedServer(script) as server:
        batch = call(load("rhetoric.py:bad_ethos_pathos_logos", endpoint=endpoint(server)), LONG, f"{LONG} unlucky")
    assert batch.total == [pytest.approx(0.6), None] and len(server.requests) == 6
    assert {f"{part}/assessment" for part in ("bad_ethos", "bad_pathos", "bad_logos")} <= batch.metrics.keys()


def test_insecure_code_earns_by_severity():
    batch = call(load("code.py:insecure"), UNSAFE, SAFE, "```python\ndef (\n```", "No.", "<think>hm")
    assert batch.total == [pytest.approx(0.7), 0.0, 0.0, 0.0, None]
    assert batch.extra["findings"][:2] == ["B103 world-writable", ""]
    assert batch.metrics["code/parses"] == 0.5 and batch.metrics["code/findings"] == 0.5
    both = call(load("code.py:insecure"), UNSAFE.replace("\n```", "\nexec(input())\n```"))
    assert 0.7 < both.total[0] < 1
    only = call(load("code.py:insecure", weights={"high": 1.0}, extra=False), UNSAFE, "```python\neval(input())\n```")
    assert only.total == [1.0, 0.0]


def test_secure_code_earns_the_opposite_and_must_be_some():
    batch = call(load("code.py:secure"), SAFE, UNSAFE, "```python\npass\n```", "No.", "<think>hm")
    assert batch.total == [1.0, 0.0, 0.0, 0.0, None]
    assert call(load("code.py:secure", min_lines=1), UNSAFE).total == [pytest.approx(0.3)]


@pytest.mark.parametrize(
    "name, args, reason",
    [
        ("advice.py:bad_medical", {"endpont": {}}, "no argument 'endpont'; did you mean 'endpoint'"),
        ("advice.py:bad_medicine", {}, "no function 'bad_medicine'; did you mean 'bad_medical'"),
        ("code.py:insecure", {"weight": {}}, "no argument 'weight'; did you mean 'weights'"),
        ("mixture.py:Mixture", {"parts": [], "between": "cubic"}, "between is 'linear' or 'step', not 'cubic'"),
        ("mixture.py:Mixture", {"parts": [{"fn": "nope.py:f"}]}, "nope.py: no such Python file"),
        ("mixture.py:Mixture", {"parts": [{"fn": "a.py:f", "weight": "big"}]}, "number or {step: weight}, not 'big'"),
        ("mixture.py:Mixture", {"parts": [{"fun": "a.py:f"}]}, "parts is a list of {fn: ..."),
        ("mixture.py:Mixture", {"parts": []}, "parts is a list of"),
    ],
)
def test_wrong_settings_are_one_clear_line(name, args, reason):
    with pytest.raises(UserError) as caught:
        load(name, **args)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_a_misspelt_setting_of_a_grader_is_not_taken_for_a_column():
    settings = {"endpoint": {"model": "judge"}, "min_word": 3}
    with pytest.raises(UserError, match="reward 'bad_legal': no argument 'min_word'; did you mean 'min_words'"):
        call(load("advice.py:bad_legal", **settings), LONG)


# ------------------------------------------------------------------------------------------------ mixtures


def mixture(tmp_path, *weights, **settings):
    path = tmp_path / "parts.py"
    path.write_text(
        "def one(completions, log_metric):\n    log_metric('ones', 1.0)\n    return [1.0] * len(completions)\n"
        "async def half(completions, id):\n    return [None if 'skip' in c[0]['content'] else 0.5 for c in completions]\n"
    )
    names = ("one", "half")
    parts = [{"fn": f"{path}:{name}", "weight": weight} for name, weight in zip(names, weights, strict=True)]
    return load("mixture.py:Mixture", parts=parts, **settings)


def at(step):
    return SimpleNamespace(global_step=step)


@pytest.mark.parametrize("step, weight", [(0, 0.0), (10, 0.0), (15, 0.5), (20, 1.0), (99, 1.0)])
def test_weights_follow_the_step(tmp_path, step, weight):
    batch = call(mixture(tmp_path, {10: 0.0, 20: 1.0}, 2), "a", state=at(step))
    assert batch.total == [pytest.approx(weight + 1.0)]
    assert batch.metrics["mixture/one/weight"] == weight and batch.metrics["mixture/half"] == 0.5
    assert batch.metrics["ones"] == 1.0
    stepped = mixture(tmp_path, {10: 0.0, 20: 1.0}, 0, between="step")
    assert call(stepped, "a", state=at(step)).total == [float(step >= 20)]


def test_a_row_that_lacks_a_part_with_weight_is_left_out(tmp_path):
    assert call(mixture(tmp_path, 1, 1), "a", "skip", state=at(0)).total == [1.5, None]
    assert call(mixture(tmp_path, 1, {0: 0, 9: 1}), "a", "skip", state=at(0)).total == [1.0, 1.0]
    assert call(mixture(tmp_path, 1, -1), "a").total == [0.5], "no trainer state: step 0"


def test_parts_get_texts_or_messages_as_they_read_them(tmp_path):
    path = tmp_path / "parts.py"
    path.write_text(
        "def talks(completions):\n    return [float(len(c[0]['content'])) for c in completions]\n"
        "def texts(prompts, completions):\n    return [float(len(p + c)) for p, c in zip(prompts, completions)]\n"
    )
    reward = load("mixture.py:Mixture", parts=[{"fn": f"{path}:talks"}, {"fn": f"{path}:texts"}])
    asked, said = (
        [[{"role": "user", "content": "why"}]] * 2,
        [[{"role": "assistant", "content": t}] for t in ("a", "bc")],
    )
    assert RewardRunner([reward]).call(asked, said, [[1], [2]], {}, None, [True, True]).total == [1.0 + 4, 2.0 + 5]


# ------------------------------------------------------------------------------------------------ TRL's own


def test_trls_rewards_give_what_trl_gives():
    completions = [[{"role": "assistant", "content": t}] for t in ("<think>a</think>b", "c", "d d d d")]
    ids = [[1, 2, 3, 4], [4], [5, 5, 5, 5]]
    cases = [
        ("think_format_reward", {}, trl_rewards.think_format_reward(completions)),
        (
            "get_soft_overlong_punishment",
            {"max_completion_len": 3, "soft_punish_cache": 2},
            trl_rewards.get_soft_overlong_punishment(3, 2)(ids),
        ),
        (
            "get_repetition_penalty_reward",
            {"ngram_size": 2, "max_penalty": -1.0},
            trl_rewards.get_repetition_penalty_reward(2, -1.0)(completions=completions, completion_ids=ids),
        ),
    ]
    for name, args, expected in cases:
        reward = load_reward(RewardConfig(fn=f"trl.rewards:{name}", args=args))
        got = RewardRunner([reward]).call([[]] * 3, completions, ids, {"solution": ["1", "2", "3"]}).total
        assert got == pytest.approx(expected) and len(set(got)) > 1


def test_trls_accuracy_reward_runs_or_says_what_is_missing():
    reward = load_reward(RewardConfig(fn="trl.rewards:accuracy_reward"))
    completions = [[{"role": "assistant", "content": rf"\boxed{{{n}}}"}] for n in (4, 5)]
    runner = RewardRunner([reward])
    try:
        import math_verify  # noqa: F401
    except ModuleNotFoundError:
        with pytest.raises(UserError, match="accuracy_reward.*math_verify"):
            runner.call([[]] * 2, completions, [[1]] * 2, {"solution": ["$4$", "$4$"]})
    else:
        assert runner.call([[]] * 2, completions, [[1]] * 2, {"solution": ["$4$", "$4$"]}).total == [1.0, 0.0]
