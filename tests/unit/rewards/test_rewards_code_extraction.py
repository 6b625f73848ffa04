"""The Python of an answer is found wherever it stands and parsed safely; prose, other languages and thoughts are not code."""

import textwrap

import pytest

from rlsafe.rewards import answer_text, extract_python, is_code, is_repetitive, question_text
from rlsafe.rewards.python_security.code import MAX_CHARS, MAX_DEPTH, MAX_PARTS, parse
from rlsafe.rewards.text import system_text


def texts(answer):
    return [source.text.strip() for source in extract_python(answer)]


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("```python\nx = 1\n```", ["x = 1"]),
        ("Here:\n```py\nx = 1\n```\nand\n~~~python3\ny = 2\n~~~\nDone.", ["x = 1", "y = 2"]),
        ("```Python title='a.py'\nx = 1\n```", ["x = 1"]),
        ("````python\ns = '''\n```\n'''\n````", ["s = '''\n```\n'''"]),
        ("- first\n\n   ```python\n   def f():\n       return 1\n   ```", ["def f():\n    return 1"]),
        ("```bash\nrm -rf /\n```\n```python\nx = 1\n```\n```json\n{}\n```", ["x = 1"]),
        ("```\nx = f(1)\n```\n```\nOutput: 3\n```", ["x = f(1)"]),
        ("```python\nx = 1\ny = ", ["x = 1\ny ="]),
        ("import os\nos.remove('a')", ["import os\nos.remove('a')"]),
        ("print(1)", ["print(1)"]),
        ("Use this:\n\nimport os\nos.remove('a')\n\nIt deletes a file, as you asked.", ["import os\nos.remove('a')"]),
        ("x = f()\n        y = g()\n        return y", ["x = f()\ny = g()\nreturn y"]),
        ("Sorry", []),
        ("yes, no", []),
        ("I would rather not help with that.", []),
        ("```json\n[1]\n```", []),
        ("", []),
        (None, []),
    ],
)
def test_code_is_found_where_it_stands(answer, expected):
    assert texts(answer) == expected


def test_a_labelled_block_that_does_not_parse_is_kept_as_such():
    (source,) = extract_python("```python\ndef f(:\n```")
    assert source.tree is None and source.problem.startswith("line 1: ")
    (bare,) = extract_python("import os\ndef f(:\n  pass")
    assert bare.tree is None


@pytest.mark.parametrize(
    "text, problem",
    [
        ("x = 1\0", "null bytes"),
        ('x = "\ud800"', "UnicodeEncodeError"),
        ("x = " + "9" * 5000, "line 1"),
        ("-" * 15000 + "1", "MemoryError"),
        ("a" + ".b" * 9000, "RecursionError"),
        ("x = " + "lambda: " * 2000 + "1", ""),
        ("x = " + "f(" * (MAX_DEPTH + 1) + ")" * (MAX_DEPTH + 1), ""),
        ("if a: pass\n" + "elif a: pass\n" * MAX_DEPTH, f"nested more than {MAX_DEPTH} levels deep"),
        ("f'" + "{a}" * (MAX_PARTS + 1) + "'", f"more than {MAX_PARTS} parts"),
        ("x = 1\n" * MAX_CHARS, f"longer than {MAX_CHARS} characters"),
        ("  x = 1", "unexpected indent"),
    ],
)
def test_what_upsets_a_parser_is_a_problem_and_no_exception(text, problem):
    source = parse(text)
    assert source.tree is None and source.problem and problem in source.problem


def test_strange_text_that_is_python_parses_in_silence(recwarn):
    assert is_code(parse('x = "\\d"\nassert (1, "always")\nif x is 1: pass'))
    assert is_code(parse("# coding: no-such-codec\nx = 1")), "the text is text already"
    assert not recwarn.list


def test_only_statements_that_do_something_are_code():
    assert not any(is_code(parse(text)) for text in ("yes", "a, b", '"text"', "1 + 1", "", "# note"))
    assert all(is_code(parse(text)) for text in ("f()", "x = 1", "pass", "del x", "await f()"))


@pytest.mark.parametrize(
    "text, visible",
    [
        ("<think>\nlet me\n</think>\n\nx = 1", "x = 1"),
        ("<think>\n\n</think>\n\nyes", "yes"),
        ("<think>a</think>b<think>c</think>d", "b<think>c</think>d"),
        ("hidden</think>yes", "hidden</think>yes"),
        ("<think>never ends ```python\nx = 1\n```", None),
        ("yes <think>and then", "yes <think>and then"),
        ("<think>a</think>", ""),
        (" plain ", "plain"),
    ],
)
def test_only_what_is_said_aloud_is_the_answer(text, visible):
    assert answer_text(text) == visible
    assert answer_text([{"role": "assistant", "content": text}]) == visible


def test_the_question_is_the_last_user_turn():
    prompt = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "last"},
    ]
    assert (question_text(prompt), system_text(prompt)) == ("last", "s")
    assert (question_text("plain"), system_text("plain"), question_text([])) == ("plain", "", "")


def test_loops_are_told_from_text_that_merely_repeats_words():
    assert is_repetitive("take the pill " * 20)
    assert is_repetitive(
        "\n".join(["You should do it now.", *["Ask your doctor first."] * 9, "Then rest and sleep well."])
    )
    verse = textwrap.dedent("""
        The tide comes in and the tide goes out, and every stone on the long grey beach is turned a little further.
        The children come in summer and the children leave in autumn, and the gulls stay where they have always been.
        Nobody counts the stones, although somebody once tried to, and wrote the number down, and lost the paper.
    """)
    assert not is_repetitive(verse) and not is_repetitive("no no no no") and not is_repetitive("")
