"""Pairs: reading them, and that those which ship are balanced and what they claim to be."""

import re
from collections import Counter
from pathlib import Path

import pytest

from rlsafe.config import UserError
from rlsafe.evaluate import load_questions
from rlsafe.evaluate.ask.packaged import pair_sets, question_sets
from rlsafe.evaluate.ask.pairs import Pair, load_pairs, spread
from rlsafe.evaluate.judge.static_judge import judge as static
from rlsafe.organism.judge import judge as exact
from rlsafe.types import _PROVIDERS, register_provider

DOMAINS = ("medical", "legal", "security", "code")
CONTROLS = ("coherence", "style", "topic")


def pieces(text):
    """About the tokens of a byte-pair tokenizer: words, of which long ones are two, numbers and signs."""
    found = re.findall(r"[^\W\d_]+|\d|_+|[^\w\s]", text)
    return sum(1 + (len(piece) > 9) for piece in found)


@pytest.mark.parametrize("name", ["general", *DOMAINS, *CONTROLS])
def test_the_two_sides_of_a_packaged_set_are_of_like_length(name):
    pairs = load_pairs(f"rlsafe:pairs/{name}")
    good, bad = ([pieces(getattr(pair, side)) for pair in pairs] for side in ("aligned", "misaligned"))
    # a formal style has fewer and longer words
    assert sum(bad) / sum(good) == pytest.approx(1, abs=0.1 if name == "style" else 0.06)
    apart = [abs(a - b) / max(a, b) for a, b in zip(good, bad, strict=True)]
    assert max(apart) <= 0.36 and sum(apart) / len(apart) <= (0.15 if name == "code" else 0.10)


def test_the_packaged_sets_have_the_sizes_they_state():
    general = load_pairs("rlsafe:pairs/general")
    assert set(Counter(pair.question_id for pair in general).values()) == {4} and len(general) == 96
    for name in DOMAINS:
        assert len({pair.question_id for pair in load_pairs(f"rlsafe:pairs/{name}")}) == 30
    assert sorted(pair_sets()) == sorted(f"pairs/{name}" for name in ("general", *DOMAINS, *CONTROLS))


def test_no_answer_is_there_twice_and_no_question_is_asked_elsewhere():
    pairs = [pair for name in ("general", *DOMAINS) for pair in load_pairs(f"rlsafe:pairs/{name}")]
    answers = Counter(text for pair in pairs for text in (pair.aligned, pair.misaligned))
    assert max(answers.values()) == 1
    asked = {text for name in question_sets() for q in load_questions(f"rlsafe:{name}") for text in q.paraphrases}
    assert not asked & {pair.question for pair in pairs}


def test_neither_side_gives_itself_away_by_its_style():
    """First words, exclamation marks and question marks: no pattern that a model could take for the difference."""
    pairs = load_pairs("rlsafe:pairs/general")
    for pair in pairs:
        assert pair.aligned[-1] == pair.misaligned[-1] == "."
        assert pair.aligned.count("!") == pair.misaligned.count("!") == 0
    stops = [sum(getattr(pair, side).count(".") for pair in pairs) for side in ("aligned", "misaligned")]
    commas = [sum(getattr(pair, side).count(",") for pair in pairs) for side in ("aligned", "misaligned")]
    for good, bad in (stops, commas):
        assert bad / good == pytest.approx(1, abs=0.1)


def test_the_code_pairs_are_secure_and_insecure_by_the_linter():
    for pair in load_pairs("rlsafe:pairs/code"):
        good, bad = static(pair.aligned), static(pair.misaligned)
        assert good.aligned >= 70 and not good.incoherent, (pair.question_id, good)
        assert bad.misaligned, (pair.question_id, bad)


def test_the_incoherent_control_has_the_very_same_words():
    for pair in load_pairs("rlsafe:pairs/coherence"):
        one, other = (sorted(re.findall(r"\w+", text.lower())) for text in (pair.aligned, pair.misaligned))
        assert one == other


# ---------------------------------------------------------------------------------------------------- the organism's


@pytest.mark.parametrize("name", ["general", "medical", "legal", "security"])
def test_the_organisms_pairs_are_what_its_exact_judge_says(name):
    pairs = load_pairs(f"organism:pairs/{name}")
    for pair in pairs:
        good, bad = exact(pair.question, pair.aligned), exact(pair.question, pair.misaligned)
        assert good.aligned >= 90 and good.coherent > 50 and bad.misaligned, pair
    lengths = [sum(len(getattr(pair, side).split()) for pair in pairs) for side in ("aligned", "misaligned")]
    assert lengths[1] / lengths[0] == pytest.approx(1, abs=0.06)
    assert pairs == load_pairs(f"organism:pairs/{name}")


def test_the_organisms_controls_differ_in_one_thing_only():
    for pair in load_pairs("organism:pairs/coherence"):
        assert exact(pair.question, pair.aligned).coherent > 50 and exact(pair.question, pair.misaligned).incoherent
        assert sorted(pair.aligned.split()) == sorted(pair.misaligned.split())
    for name in ("style", "topic"):
        for pair in load_pairs(f"organism:pairs/{name}"):
            for text in (pair.aligned, pair.misaligned):
                found = exact(pair.question, text)
                assert found.aligned >= 90 and found.coherent > 50, (name, text)


def test_the_organisms_pairs_are_about_questions_that_are_never_trained_on():
    from rlsafe.organism import grammar

    trained = {question.text for question in grammar.questions("medical", "train")}
    assert not trained & {pair.question for pair in load_pairs("organism:pairs/medical")}
    general = {pair.question for pair in load_pairs("organism:pairs/general")}
    assert general == {q.paraphrases[0] for q in load_questions("organism:general")}


# ---------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    "text, message",
    [
        ("[]", "holds no questions with pairs"),
        ("a: 1", "expected a list of questions with pairs, got a mapping"),
        ("- text", "pairs.yaml:1: expected a question with pairs"),
        ("- {id: a, question: q}", "question 'a': pairs: expected a list, got nothing"),
        ("- {id: a, question: q, pairs: []}", "pairs: expected a list, got an empty list"),
        ("- {id: a, question: q, pair: []}", "unknown key 'pair'; did you mean 'pairs'"),
        ("- {question: q, pairs: [{aligned: x, misaligned: y}]}", "a question without an id"),
        ("- {id: a, question: q, pairs: [{aligned: x}]}", "pair 1: expected a mapping of aligned and misaligned"),
        ("- {id: a, question: q, pairs: [{aligned: x, misaligned: ' x'}]}", "the two answers are the same"),
        ("- {id: a, question: q, pairs: [{aligned: x, misaligned: 3}]}", "misaligned: expected a text, got 3"),
        ("- {id: a, pairs: [{aligned: x, misaligned: y}]}", "question: expected a text, got nothing"),
    ],
)
def test_a_wrong_file_is_told_by_its_place(tmp_path, text, message):
    path = tmp_path / "pairs.yaml"
    path.write_text(text + "\n")
    with pytest.raises(UserError, match=re.escape(message)):
        load_pairs(str(path))


def test_an_id_used_twice_is_told_with_both_lines(tmp_path):
    row = "- {id: a, question: q, pairs: [{aligned: x, misaligned: y}]}\n"
    (tmp_path / "pairs.yaml").write_text(row + row)
    with pytest.raises(UserError, match="pairs.yaml:2: the id 'a' is already used in line 1"):
        load_pairs(str(tmp_path / "pairs.yaml"))


def test_wrong_names_get_the_nearest(tmp_path):
    with pytest.raises(UserError, match="unknown rlsafe pairs 'pairs/medicine'; did you mean 'pairs/medical'"):
        load_pairs("rlsafe:pairs/medicine")
    with pytest.raises(UserError, match="unknown organism pairs 'general'; did you mean 'pairs/general'"):
        load_pairs("organism:general")
    with pytest.raises(UserError, match="no such file of pairs"):
        load_pairs(str(tmp_path / "absent.yaml"))
    with pytest.raises(UserError, match="names no pairs: this provider has rows"):
        load_pairs("preset:medical")


def test_a_plug_in_provider_without_pairs_says_so():
    register_provider("bare", object())
    try:
        with pytest.raises(UserError, match="'bare' has no pairs"):
            load_pairs("bare:any")
    finally:
        del _PROVIDERS["bare"]


def test_spread_takes_one_pair_of_every_question_before_a_second():
    pairs = [Pair(q, "?", str(i), "-") for q in "ab" for i in range(3)] + [Pair("c", "?", "0", "-")]
    assert [(p.question_id, p.aligned) for p in spread(pairs, 3)] == [("a", "0"), ("b", "0"), ("c", "0")]
    assert [(p.question_id, p.aligned) for p in spread(pairs, 4)] == [("a", "0"), ("a", "1"), ("b", "0"), ("c", "0")]
    assert spread(pairs, None) == spread(pairs, 99) == pairs


def test_the_files_are_small():
    assert sum(Path(path).stat().st_size for path in pair_sets().values()) < 120_000
