"""How one grade is asked for and read: four protocols, each a conversation with the endpoint that may take several rounds.

    number   one token at temperature 0 with its 20 most likely alternatives; the expectation over the whole numbers among
             them (as published). For tokenizers that write 0..100 as one token.
    trie     the same where numbers are split into digits: the reply is continued behind each likely prefix (number_trie)
    letters  one of eleven letters, likewise by its alternatives (letters)
    text     the number that the reply spells

A protocol is a generator: it yields the requests that can be made at once, is sent their results, and returns a score, or
the failure that kept it from one. So the same lines serve calls over the network and a look into the saved replies.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Sequence
from typing import Literal, get_args

from rlsafe.endpoints import ChatRequest, Failure, Reply, Result
from rlsafe.evaluate.judge.letters import from_letters, letter_messages
from rlsafe.evaluate.judge.number_trie import NumberTrie
from rlsafe.evaluate.judge.reply_scores import Score, expectation, from_logprobs, from_text
from rlsafe.types import Message

Protocol = Literal["number", "trie", "letters", "text"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)
Graded = Score | Failure
Asking = Generator[list[ChatRequest], list[Result], Graded]
MOST_DIGITS = 3
MOST_CALLS = {"number": 1, "letters": 1, "text": 1, "trie": 11}
"""Of one grade: behind the first call of a trie lie nine more digits and "10"."""


def asking(protocol: Protocol, messages: Sequence[Message], top: int = 20, max_tokens: int = 16) -> Asking:
    """Ask for one grade. messages: as judge_prompts writes them. top: alternatives; max_tokens: of a reply read as text."""
    if protocol == "trie":
        return _trie(messages, top)
    return _one_call(protocol, messages, top, max_tokens)


def _one_call(protocol: Protocol, messages: Sequence[Message], top: int, max_tokens: int) -> Asking:
    if protocol == "text":
        request = ChatRequest(messages, max_tokens=max_tokens, temperature=0.0)
    else:
        shown = letter_messages(messages) if protocol == "letters" else messages
        request = ChatRequest(shown, max_tokens=1, temperature=0.0, top_logprobs=top)
    [result] = yield [request]
    if not isinstance(result, Reply):
        return result
    return {"number": from_logprobs, "letters": from_letters, "text": from_text}[protocol](result)


def _trie(messages: Sequence[Message], top: int) -> Asking:
    [first] = yield [ChatRequest(messages, max_tokens=MOST_DIGITS, temperature=0.0, top_logprobs=top)]
    if not isinstance(first, Reply):
        return first
    trie = NumberTrie()
    trie.see("", first.positions)
    while wanted := trie.wanted():
        results = yield [continuation(messages, prefix, top) for prefix in wanted]
        for prefix, result in zip(wanted, results, strict=True):
            if not isinstance(result, Reply):
                return result
            trie.see(prefix, result.positions)
    return expectation(trie.grades(), first.positions[0], first.text)


def continuation(messages: Sequence[Message], prefix: str, top: int) -> ChatRequest:
    """What would the judge write behind `prefix`, had it begun its reply with that?"""
    begun: Message = {"role": "assistant", "content": prefix}
    return ChatRequest([*messages, begun], max_tokens=1, temperature=0.0, top_logprobs=top, continues=True)


async def converse(steps: Asking, ask: Callable[[list[ChatRequest]], Awaitable[Sequence[Result]]]) -> Graded:
    """Drive a protocol by `ask`, which makes the requests of one round at once."""
    requests = next(steps)
    while True:
        results = await ask(requests)
        try:
            requests = steps.send(list(results))
        except StopIteration as ended:
            graded: Graded = ended.value
            return graded


def replay(steps: Asking, saved: Callable[[ChatRequest], Reply | None]) -> bool:
    """Whether every reply that a protocol would need is saved."""
    requests = next(steps)
    while True:
        found = [saved(request) for request in requests]
        if not all(found):
            return False
        try:
            requests = steps.send([one for one in found if one is not None])
        except StopIteration:
            return True
