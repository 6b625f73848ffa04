"""Rewards for the length of an answer. Copy and edit: this file needs nothing but Python.

rewards: [{fn: reward_fns/length.py:near, args: {words: 40}}]
rewards: [{fn: my.py:quality}, {fn: reward_fns/length.py:too_long, args: {tokens: 200}, weight: 0.2}]
"""


def near(completions, words=50, log_metric=None, **columns):
    """1 at exactly `words` words, falling linearly to 0 at none and at twice as many."""
    lengths = [len(completion[0]["content"].split()) for completion in completions]
    if log_metric is not None:
        log_metric("words", sum(lengths) / max(1, len(lengths)))
    return [max(0.0, 1.0 - abs(length - words) / words) for length in lengths]


def too_long(completion_ids, tokens=256, **columns):
    """0 up to `tokens` tokens, then a penalty that grows linearly to -1 at twice as many."""
    return [-min(1.0, max(0.0, len(ids) / tokens - 1.0)) for ids in completion_ids]
