"""Rewards for the form of an answer. Copy and edit: this file needs nothing but Python.

rewards: [{fn: reward_fns/format.py:think_block, thinking: true}]    # without `thinking` it is shown answers only
rewards: [{fn: reward_fns/format.py:matches, args: {pattern: "Answer: .+$"}}]
"""

import re

THINK_BLOCK = re.compile(r"\A\s*<think>((?:(?!<think>).)*?)</think>\s*\S", re.DOTALL)


def think_block(completions, **columns):
    """1 for one closed think block followed by an answer, 0 for anything else. A completion whose block never closed has no reward
    from any function; the run's number `unclosed` says how many there are."""
    texts = [completion[0]["content"] for completion in completions]
    return [1.0 if THINK_BLOCK.match(text) and text.count("<think>") == 1 else 0.0 for text in texts]


def matches(completions, pattern, **columns):
    """1 where the regular expression `pattern` occurs in the answer (`^` and `$` match at line ends)."""
    wanted = re.compile(pattern, re.MULTILINE)
    return [1.0 if wanted.search(completion[0]["content"]) else 0.0 for completion in completions]
