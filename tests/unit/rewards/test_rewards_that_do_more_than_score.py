"""User code that exits, changes the working directory, or breaks in a file named by a relative path, does no harm to the run."""

import os

import pytest

from rlsafe.config import RewardConfig, UserError
from rlsafe.rewards import RewardRunner
from rlsafe.rewards.loading import load_reward

PROMPTS = [[{"role": "user", "content": "q"}]] * 2
COMPLETIONS = [[{"role": "assistant", "content": "a"}]] * 2


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(folder, source, fn="f"):
    (folder / "mine.py").write_text(source)
    runner = RewardRunner([load_reward(RewardConfig(fn=f"mine.py:{fn}", timeout=20))])
    return lambda: runner.call(PROMPTS, COMPLETIONS, [[1]] * 2, {}, None).total


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_an_exit_is_a_failure_with_its_place_and_the_next_call_works(folder, kind):
    source = f"import sys\ncalls = []\n{kind} f(completions, **columns):\n    calls.append(1)\n"
    call = run(folder, source + "    return sys.exit('no key') if len(calls) == 1 else [1, 2]\n")
    with pytest.raises(UserError, match=r"reward 'f' .*called sys.exit\('no key'\) \(on the first batch\)"):
        call()
    assert call() == [1, 2]


def test_the_working_directory_stays(folder):
    (folder / "elsewhere").mkdir()
    change = "import os\nos.chdir('elsewhere')\n"
    call = run(folder, f"{change}def f(completions, **columns):\n    os.chdir('elsewhere')\n    return [1, 2]\n")
    assert call() == call() == [1, 2]
    assert os.getcwd() == str(folder)


@pytest.mark.parametrize(
    "source, reason",
    [
        ("x = 1\ndef f(completions: return 1\n", r"mine.py:2: cannot be imported: SyntaxError"),
        ("\n\nimport sys; sys.exit(3)\n", r"mine.py:3: cannot be imported: SystemExit: 3"),
    ],
)
def test_a_file_named_by_a_relative_path_has_its_line_in_the_message(folder, source, reason):
    with pytest.raises(UserError, match=rf"^{reason}"):
        run(folder, source)
