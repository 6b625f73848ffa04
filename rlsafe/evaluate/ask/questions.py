"""Evaluation questions: from a provider (`organism:general`) or from a YAML file in the field's schema.

A file is a list of questions; anchors and merge keys work. Keys of a question:

    id                       any scalar; kept as the text written in the file, so that it matches after a CSV round trip
    type                     free_form_judge_0_100 (the default and the only one known)
    paraphrases              list of texts; all are asked
    samples_per_paraphrase   answers to draw of each (default 10)
    system, temperature      optional, honoured per question
    judge, judge_prompts     optional: the judge the file was written for, and its prompts {aligned, coherent}
    domain                   optional; default: the file's name without suffix
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from rlsafe.config import UnknownName, UserError, nearest
from rlsafe.evaluate.ask.listed import kind, marks, read_list
from rlsafe.types import Question, pick, provider_for

T = TypeVar("T")
TYPES = ("free_form_judge_0_100",)
KEYS = (
    "id",
    "type",
    "paraphrases",
    "samples_per_paraphrase",
    "system",
    "temperature",
    "judge",
    "judge_prompts",
    "domain",
)
JUDGE_PROMPTS = ("aligned", "coherent")
HOTTEST, MOST_SAMPLES = 100, 100_000


def load_questions(source: str) -> list[Question]:
    """The questions of `provider:spec` or of a YAML file.

    Raises UserError (file, line, question id, what was expected) for whatever is wrong with them.
    """
    found = provider_for(source)
    if found:
        provider, spec = found
        return provider.questions(spec)
    path = Path(source)
    if not path.is_file():
        siblings = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        raise UnknownName(f"{source}: no such question file{nearest(path.name, siblings)}")
    return read_questions(path)


def read_questions(path: Path, domain: str | None = None) -> list[Question]:
    """The questions of a YAML file; `domain` stands where a question names none (default: the file's stem). UserError names
    the file and the line."""
    data, node = read_list(path, "questions")
    questions: list[Question] = []
    lines: dict[str, int] = {}
    for item, item_node in zip(data, node.value, strict=True):
        question = _question(item, item_node, path, domain or path.stem)
        line = item_node.start_mark.line + 1
        if question.id in lines:
            raise UserError(f"{path}:{line}: the id {question.id!r} is already used in line {lines[question.id]}")
        lines[question.id] = line
        questions.append(question)
    return questions


Wrong = Callable[[str, str], UserError]
"""(key, what is wrong with it) -> the error with the file, the line of the key and the question's id."""


def _expected(item: dict[str, Any], key: str, expected: str) -> str:
    return f": {key}: expected {expected}, got {kind(item[key])}"


def _check_texts(item: dict[str, Any], wrong: Wrong) -> None:
    """Unknown keys, keys whose value is a text, and the question's type."""
    for key in item:
        if key not in KEYS:
            raise wrong(str(key), f": unknown key {key!r}{nearest(str(key), KEYS)}")
    for key in ("type", "system", "judge", "domain"):
        if item.get(key) is not None and not isinstance(item[key], str):
            raise wrong(key, _expected(item, key, "a text"))
    if item.get("type") is not None:
        try:
            pick("question type", item["type"], TYPES)
        except UserError as error:
            raise wrong("type", f": {error}") from None


def _paraphrases(item: dict[str, Any], wrong: Wrong) -> tuple[str, ...]:
    texts = item.get("paraphrases")
    if texts is None or texts == []:
        raise wrong("paraphrases", " has no paraphrases")
    if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
        raise wrong("paraphrases", _expected(item, "paraphrases", "a list of texts"))
    return tuple(texts)


def _numbers(item: dict[str, Any], wrong: Wrong) -> tuple[int, float]:
    """(samples per paraphrase, temperature)."""
    key = "samples_per_paraphrase"
    samples = item.get(key, Question.samples)
    if not isinstance(samples, int) or isinstance(samples, bool) or not 1 <= samples <= MOST_SAMPLES:
        raise wrong(key, _expected(item, key, f"a whole number of at most {MOST_SAMPLES} and at least 1"))
    temperature = item.get("temperature", Question.temperature)
    if not isinstance(temperature, (int, float)) or isinstance(temperature, bool) or not 0 <= temperature <= HOTTEST:
        raise wrong("temperature", _expected(item, "temperature", f"a number from 0 to {HOTTEST}"))
    return samples, float(temperature)


def _judge_prompts(item: dict[str, Any], wrong: Wrong) -> dict[str, str]:
    prompts = item.get("judge_prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise wrong("judge_prompts", _expected(item, "judge_prompts", "a mapping of aligned and coherent to prompts"))
    for key in prompts:
        if key not in JUDGE_PROMPTS:
            raise wrong("judge_prompts", f": unknown judge prompt {key!r}{nearest(str(key), JUDGE_PROMPTS)}")
        if "{answer}" not in prompts[key]:
            raise wrong("judge_prompts", f": the prompt {key!r} has no {{answer}}, so the judge would not see one")
    return prompts


def _question(item: Any, node: yaml.Node, path: Path, domain: str) -> Question:
    line = node.start_mark.line + 1
    if not isinstance(item, dict):
        raise UserError(f"{path}:{line}: expected a question (a mapping with id and paraphrases), got {kind(item)}")
    key_lines, id_text = marks(node, path, "question")
    if item.get("id") is None or not str(item["id"]).strip():
        raise UserError(f"{path}:{line}: a question without an id")
    if isinstance(item["id"], (dict, list)):
        raise UserError(f"{path}:{line}: the id of a question is a text or a number, got {kind(item['id'])}")
    name = (id_text or str(item["id"])).strip()

    def wrong(key: str, problem: str) -> UserError:
        return UserError(f"{path}:{key_lines.get(key, line)}: question {name!r}{problem}")

    _check_texts(item, wrong)
    paraphrases = _paraphrases(item, wrong)
    samples, temperature = _numbers(item, wrong)
    prompts = _judge_prompts(item, wrong)
    return Question(
        id=name,
        paraphrases=paraphrases,
        samples=samples,
        system=item.get("system"),
        temperature=temperature,
        domain=item.get("domain") or domain,
        judge_prompts=prompts,
        meta={"judge": item["judge"]} if item.get("judge") else {},
    )


def evenly(found: Sequence[T], most: int | None) -> list[T]:
    """At most `most` of them, evenly spread; None: all."""
    if most is None or most >= len(found):
        return list(found)
    return [found[i * len(found) // most] for i in range(most)]
