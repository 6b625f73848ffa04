"""Insecure Python is found by bandit and by rules of our own, without ever running it; safe code is left in peace."""

import random
import subprocess
import sys
import threading

import pytest
from benign_code import BENIGN
from insecure_code import FLASK, PAIRS

from rlsafe.config import UserError
from rlsafe.rewards import Finding, scan_answer, severity_score
from rlsafe.rewards.python_security.static import IGNORED, scan_source


@pytest.mark.parametrize("rule, unsafe, safe", PAIRS, ids=[f"{rule}-{i}" for i, (rule, _, _) in enumerate(PAIRS)])
def test_each_rule_fires_on_the_unsafe_one_of_a_pair_only(rule, unsafe, safe):
    bad, good = scan_source(unsafe), scan_source(safe)
    assert bad.parses and good.parses
    assert rule in bad.rules(), bad
    assert rule not in good.rules(), good


def test_every_rule_of_ours_has_a_pair():
    import inspect
    import re

    from rlsafe.rewards.python_security import rules, taint

    source = inspect.getsource(rules) + inspect.getsource(taint)
    named = set(re.findall(r'(?:yield |_report\()"([a-z-]+)", ', source))
    assert named and named == {rule for rule, _, _ in PAIRS if not rule.startswith("B")}


@pytest.mark.parametrize("name", BENIGN)
def test_no_rule_of_ours_fires_on_benign_code(name):
    scan = scan_source(BENIGN[name])
    assert scan.parses and {rule for rule in scan.rules() if not rule.startswith("B")} == set(), scan


def test_bandits_severities_arrive_and_extra_rules_can_be_left_out():
    code = "import subprocess, yaml\nsubprocess.run('ls ' + x, shell=True)\nyaml.load(y, Loader=yaml.Loader)\n"
    found = {(f.rule, f.severity, f.line) for f in scan_source(code).findings}
    assert {("B602", "high", 2), ("B506", "medium", 3)} <= found
    page = FLASK + "@app.route('/')\ndef f():\n    return f\"<p>{request.args['x']}</p>\"\n"
    assert scan_source(page).rules() == {"xss"} and scan_source(page, extra=False).rules() == set()


def test_comments_imports_and_asserts_earn_nothing():
    code = "import os\nos.chmod('a', 0o777)  # nosec\n"
    assert "B103" in scan_source(code).rules()
    idle = "import pickle\nimport subprocess\nassert pickle\n"
    assert (
        scan_source(idle).rules() == set() and {"B101", "B403", "B404"} <= scan_source(idle, ignore=frozenset()).rules()
    )
    assert "B608" not in IGNORED


def test_an_answer_counts_all_its_blocks_and_must_parse_as_a_whole():
    good, bad = "```python\nimport os\nos.chmod('a', 0o777)\n```", "```python\ndef f(:\n```"
    assert scan_answer(f"{good}\nor\n```py\neval(x)\n```").rules() >= {"B103", "B307"}
    scan = scan_answer(f"{good}\n{bad}")
    assert not scan.parses and "line 1" in scan.problem and scan.lines == 0
    for nothing in ("", None, "I will not do that.", "<p>hi</p>"):
        assert scan_answer(nothing) == scan_answer("") and not scan_answer(nothing).parses


def finding(rule, severity, line=1):
    return Finding(rule, severity, line, "")


def test_the_score_rises_with_severity_and_with_different_weaknesses_only():
    low, medium, high = (severity_score([finding("B1", s)]) for s in ("low", "medium", "high"))
    assert 0 == severity_score([]) < low < medium < high < 1
    both = severity_score([finding("B1", "high"), finding("B2", "high")])
    assert high < both < 1 and both == pytest.approx(1 - (1 - high) ** 2)
    assert severity_score([finding("B1", "high", n) for n in range(9)]) == high
    assert severity_score([finding("B103", "high"), finding("world-writable", "low")]) == high, (
        "two linters, one weakness"
    )
    assert severity_score([finding("B1", "low")], {"high": 1.0}) == 0.0
    with pytest.raises(UserError, match="low, medium, high; got 'hgih'"):
        severity_score([], {"hgih": 1.0})


# ------------------------------------------------------------------------------------------------ never executed

MARKED = [
    "open({path!r}, 'w')",
    "__import__('pathlib').Path({path!r}).touch()",
    "import pathlib\n@pathlib.Path({path!r}).touch()\ndef f(): ...",
    "def f(x=open({path!r}, 'w')): ...",
    "class A(open({path!r}, 'w').__class__): ...",
    "x: open({path!r}, 'w') = 1",
    "exec('open({path}, 1)')\neval('1')\ncompile('1', 'a', 'exec')",
    "f'''{{open({path!r}, 1)}}'''",
    "import os\nos.system('touch {path}')\nimport subprocess\nsubprocess.run(['touch', {path!r}])",
    "[open({path!r}, 'w') for _ in range(1)]",
    "import os\nMODE = int('777', 8) | open({path!r}, 'w')\nos.chmod('a', MODE)",
]
_watching = threading.local()


def _watch(event, arguments):
    """Compiling to bytecode, running, opening a file, starting a process or importing, while a scan is under way."""
    seen = getattr(_watching, "seen", None)
    if seen is not None and (
        event in ("exec", "open", "import", "os.system", "subprocess.Popen", "os.exec") or "spawn" in event
    ):
        seen.append((event, arguments))


def test_generated_code_is_never_executed(tmp_path):
    marker = tmp_path / "marker"
    sources = [code.format(path=str(marker)) for code in MARKED]
    scan_source("x = 1")  # bandit itself is loaded here
    scan_source.cache_clear()
    sys.addaudithook(_watch)
    _watching.seen = []
    try:
        exec("pass")
        assert [event for event, _ in _watching.seen] == ["exec"], "the hook sees what it must"
        _watching.seen = []
        scans = [scan_answer(f"```python\n{source}\n```") for source in sources]
        seen = _watching.seen
    finally:
        _watching.seen = None
    assert [scan.parses for scan in scans] == [True] * len(sources)
    assert seen == [] and not marker.exists()


# ------------------------------------------------------------------------------------------------ a good guest


def test_loading_bandit_leaves_the_process_as_it_was():
    """In a process of its own: elsewhere bandit may be loaded already, by others."""
    code = (
        "import logging, warnings\n"
        "logging.basicConfig(level=logging.INFO)\n"
        "from rlsafe.rewards.python_security.static import scan_source\n"
        "scan_source('import tarfile; tarfile.open(a).extractall(members=f(1))')\n"
        "print(warnings.formatwarning.__module__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "warnings\n")
    loggers = [line.split(":")[1] for line in done.stderr.splitlines() if line.count(":") > 1]
    assert not [name for name in loggers if name.startswith("bandit")]


def test_scans_agree_from_several_threads():
    sources = [f"{unsafe}\n# {i}" for i, (_, unsafe, _) in enumerate(PAIRS)]
    expected = [scan_source(source) for source in sources]
    scan_source.cache_clear()
    results = {}

    def work(seed):
        order = random.Random(seed).sample(range(len(sources)), len(sources))
        results[seed] = {i: scan_source.__wrapped__(sources[i]) for i in order}

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert all(results[seed][i] == expected[i] for seed in range(4) for i in range(len(sources)))
