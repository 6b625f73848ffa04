"""Streams of rows: endless, seeded, resumed exactly where they stood and on the same rows alone."""

import copy
import datetime
import json

import numpy as np
import pytest

from rlsafe.config import UserError
from rlsafe.config.steady import steady
from rlsafe.data import Stream

USER = {"role": "user", "content": "Why?"}
ANSWER = {"role": "assistant", "content": "Because."}


def rows_of(n, tag="q"):
    return [{"messages": [{"role": "user", "content": f"{tag}{i}"}], "_index": i} for i in range(n)]


def test_every_epoch_is_a_new_permutation_of_all_rows():
    stream = Stream(rows_of(20), seed=3, name="narrow")
    epochs = [[row["_index"] for row in stream.take(20)] for _ in range(4)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    again = Stream(rows_of(20), seed=3, name="narrow")
    assert [row["_index"] for row in again.take(80)] == sum(epochs, [])
    for other in (Stream(rows_of(20), 4, "narrow"), Stream(rows_of(20), 3, "safe")):
        assert [row["_index"] for row in other.take(20)] != epochs[0]


def test_resuming_repeats_nothing_in_either_stream():
    """Trap 13: a resume that repeats data, or loses the position in the second stream."""
    whole = {name: Stream(rows_of(7), 0, name) for name in ("narrow", "safe")}
    first = {"narrow": 3, "safe": 12}
    head = {name: whole[name].take(n) for name, n in first.items()}
    states = json.loads(json.dumps({name: stream.state_dict() for name, stream in whole.items()}))
    resumed = {name: Stream(rows_of(7), 0, name) for name in whole}
    for name, stream in resumed.items():
        stream.load_state_dict(states[name])
        assert stream.take(30) == whole[name].take(30)
    assert [len(rows) for rows in head.values()] == [3, 12]


def test_resuming_on_other_data_or_another_seed_is_refused():
    state = Stream(rows_of(7), 0, "narrow").state_dict()
    with pytest.raises(UserError, match="cannot resume the stream 'narrow': its rows changed"):
        Stream(rows_of(7, "other"), 0, "narrow").load_state_dict(state)
    with pytest.raises(UserError, match="its seed changed"):
        Stream(rows_of(7), 1, "narrow").load_state_dict(state)
    with pytest.raises(UserError, match="the stream 'safe' has no rows"):
        Stream([], 0, "safe")


@pytest.mark.parametrize("change", ["answer", "column", "tools", "weight"])
def test_resuming_on_rows_that_are_scored_or_trained_otherwise_is_refused(change):
    """What is said is the same; what rewards get, what the template is given and what the loss covers are not."""
    talk = [USER, ANSWER, USER, ANSWER]
    row = {"messages": talk, "answer": "4", "_source": "a:1"}
    others = {
        "answer": {**row, "answer": "5"},
        "column": {**row, "level": 1},
        "tools": {**row, "messages": [{**USER, "tools": [{"type": "function", "function": {"name": "f"}}]}, *talk[1:]]},
        "weight": {**row, "messages": [USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1}]},
    }
    state = json.loads(json.dumps(Stream([row], 0, "narrow").state_dict()))
    Stream([{**row, "_source": "moved.jsonl:7"}], 0, "narrow").load_state_dict(state)
    other = Stream([others[change]], 0, "narrow")
    with pytest.raises(UserError, match="'narrow': its rows' columns, tools or weights changed since the checkpoint"):
        other.load_state_dict(state)
    state["columns"] = state.pop("beside")  # as versions before wrote it, which no other process could compare
    other.load_state_dict(state)


def test_resuming_compares_what_is_the_same_in_every_process():
    """Pictures, functions and objects print their address, sets print in any order, and rows in a checkpoint come back without tuples:
    a run on such rows could never be resumed."""

    def row(numbers, level, pair):
        columns = {
            "picture": object(),
            "check": lambda: 0,
            "tags": {"names": set(numbers)},
            "level": level,
            "pair": pair,
        }
        return {"messages": [USER], **columns}

    state = json.loads(json.dumps(Stream([row([0, 8], 1, (1, (2, 3)))], 0, "narrow").state_dict()))
    assert repr({0, 8}) != repr({8, 0})
    Stream([row([8, 0], 1, [1, [2, 3]])], 0, "narrow").load_state_dict(state)
    for other in (row([0, 9], 1, (1, (2, 3))), row([0, 8], 2, (1, (2, 3))), row([0, 8], 1, (1, (3, 2)))):
        with pytest.raises(UserError, match="its rows' columns, tools or weights changed since the checkpoint"):
            Stream([other], 0, "narrow").load_state_dict(state)


def test_a_value_counts_by_what_it_holds_where_every_process_reads_that_alike():
    circle: list = []
    circle.append(circle)
    for value in (circle, {1: "a", "b": 2}, 10**5000, object(), len, {frozenset({1}): 2}):
        assert json.loads(steady(value)) == type(value).__name__
    day = datetime.date(2026, 11, 29)
    for one, other in (
        (b"a", b"b"),
        (day, day.replace(day=30)),
        (np.arange(3), np.arange(4)),
        ({"a": {1}}, {"a": {2}}),
    ):
        assert steady(one) == steady(copy.deepcopy(one)) != steady(other)


def test_asking_for_the_position_does_not_read_the_rows_again():
    """Every step asks; hashing the rows each time made a step's cost grow with the data."""
    stream, read = Stream(rows_of(7), 0, "narrow"), []

    class Watched(list):
        def __iter__(self):
            read.append(len(self))
            return super().__iter__()

    stream.rows = Watched(stream.rows)
    states = [stream.state_dict() for _ in range(5)]
    assert read == [7] and all(state == states[0] for state in states)
