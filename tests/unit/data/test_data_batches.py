"""Micro-batches: a token budget, right padding, both contexts of a rollout aligned; and the refusal filter."""

import math
import random

import pytest
import torch
from words import chat, word_tokenizer

from rlsafe.config import UserError
from rlsafe.data import REFUSALS, Rollout, encode_row, fit_rows, is_refusal, rollout_batches, sft_batches
from rlsafe.data.collate import micro_batches
from rlsafe.types import Completion, Where

SFT = Where("narrow", "sft", "train")
GRPO = Where("narrow", "grpo", "train")
PAD = 1


def conversations(n, seed=0):
    rng = random.Random(seed)
    words = ["one", "two", "three", "yes", "no"]
    return [
        chat(" ".join(rng.choices(words, k=rng.randint(1, 12))), " ".join(rng.choices(words, k=rng.randint(1, 30))))
        for _ in range(n)
    ]


def test_batches_hold_every_row_once_right_padded_within_the_budget():
    tokenizer = word_tokenizer()
    rows = conversations(60)
    batches = sft_batches(rows, tokenizer, SFT, max_tokens=1000, micro_tokens=200, micro_rows=9)
    seen = []
    for batch in batches:
        assert batch.ids.shape == batch.attention.shape == batch.loss_mask.shape
        assert batch.ids.numel() <= 200 and len(batch) <= 9 and batch.where == SFT
        assert (batch.attention.diff(dim=1) <= 0).all(), "padding is on the right"
        assert (batch.ids[batch.attention == 0] == PAD).all() and not batch.loss_mask[batch.attention == 0].any()
        assert (batch.attention.sum(1) == batch.ids.shape[1]).any(), "no longer than its longest row (trap 12)"
        assert batch.row_weight.tolist() == [1.0] * len(batch)
        for ids, mask, real in zip(batch.ids, batch.loss_mask, batch.attention.bool(), strict=True):
            seen.append((ids[real].tolist(), mask[real].tolist()))
    assert sorted(seen) == sorted(encode_row(tokenizer, row) for row in rows)
    padded = sum(batch.ids.numel() for batch in batches)
    assert padded < 1.15 * sum(batch.tokens for batch in batches), "sorting by length keeps padding small"


def test_weights_follow_their_rows_and_long_rows_are_left_out():
    tokenizer = word_tokenizer()
    rows = conversations(20)
    lengths = [len(encode_row(tokenizer, row)[0]) for row in rows]
    limit = sorted(lengths)[12]
    batches = sft_batches(rows, tokenizer, SFT, limit, micro_tokens=100, weights=[float(n) for n in lengths])
    assert sum(map(len, batches)) == sum(n <= limit for n in lengths) < 20
    for batch in batches:
        assert batch.row_weight.tolist() == batch.attention.sum(1).tolist()
    assert sft_batches(rows, tokenizer, SFT, max_tokens=2, micro_tokens=100) == []


def test_rows_that_are_too_long_are_dropped_cut_or_refused_as_the_config_says():
    tokenizer = word_tokenizer()
    talks = [*conversations(19), chat("one " * 80, "yes no")]
    rows = [{"messages": messages, "_source": f"f.jsonl:{i}"} for i, messages in enumerate(talks, 1)]
    lengths = [len(encode_row(tokenizer, row["messages"])[0]) for row in rows]
    prompts = [encode_row(tokenizer, row["messages"])[1].index(True) for row in rows]
    limit = sorted(lengths)[8]
    long = sum(n > limit for n in lengths)
    dropped = fit_rows(rows, tokenizer, limit)
    assert (len(dropped.rows), dropped.dropped, dropped.cut) == (20 - long, long, 0)

    cut = fit_rows(rows, tokenizer, limit, "truncate")
    hopeless = sum(n >= limit for n in prompts)
    assert (cut.dropped, cut.cut) == (hopeless, long - hopeless) and 0 < hopeless < long < 20
    batches = sft_batches([r["messages"] for r in cut.rows], tokenizer, SFT, limit, micro_tokens=100, truncate=True)
    assert sum(map(len, batches)) == len(cut.rows) and max(b.ids.shape[1] for b in batches) == limit
    assert all(batch.loss_mask.any(1).all() for batch in batches), "what is left of every answer is trained on"
    left_out = sft_batches([r["messages"] for r in rows], tokenizer, SFT, limit, micro_tokens=100, truncate=True)
    assert sum(map(len, left_out)) == len(cut.rows), (
        "rows that lose their whole answer are left out, not cut to a prompt"
    )

    first = next(i for i, n in enumerate(lengths) if n > limit)
    with pytest.raises(
        UserError, match=rf"f.jsonl:{first + 1}: {lengths[first]} tokens, more than max_tokens = {limit}"
    ):
        fit_rows(rows, tokenizer, limit, "error")


def test_batching_is_deterministic_and_one_row_may_exceed_the_budget():
    assert micro_batches([3, 9, 3, 5], micro_tokens=8) == [[1], [3], [0, 2]]
    assert micro_batches([3, 9, 3, 5], micro_tokens=100, micro_rows=3) == [[1], [3, 0, 2]]  # 24 padded tokens, not 30
    assert micro_batches([], micro_tokens=8) == []
    tokenizer = word_tokenizer()
    once, twice = (sft_batches(conversations(30), tokenizer, SFT, 500, 120) for _ in range(2))
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(once, twice, strict=True))


def test_rows_of_different_lengths_are_split_where_padding_costs_more_than_a_micro_batch():
    """Against every way to cut the sorted rows: none within the limits is cheaper."""
    rng = random.Random(0)
    for budget, rows, cost in [(10_000, None, 64), (10_000, None, 0), (300, None, 20), (10_000, 3, 64), (90, 2, 5)]:
        lengths = [rng.randint(10, 80) for _ in range(9)]
        ordered = sorted(lengths, reverse=True)

        def price(pieces: list[list[int]], cost: int = cost) -> int:
            return sum(piece[0] * len(piece) + cost for piece in pieces)

        every = []
        for cuts in range(2**8):
            edges = [0, *(i + 1 for i in range(8) if cuts >> i & 1), 9]
            pieces = [ordered[a:b] for a, b in zip(edges, edges[1:], strict=False)]
            if all(len(p) == 1 or (p[0] * len(p) <= budget and len(p) <= (rows or 9)) for p in pieces):
                every.append(price(pieces))
        made = micro_batches(lengths, budget, rows, split_tokens=cost)
        assert sorted(index for batch in made for index in batch) == list(range(9))
        assert price([[lengths[index] for index in batch] for batch in made]) == min(every)
    assert len(micro_batches([50, 50, 51, 49], 10_000, split_tokens=64)) == 1
    assert micro_batches([400, 50, 50], 10_000, split_tokens=64) == [[0], [1, 2]]


def rollout(prompt, completion, seen=None, finish="stop", advantage=1.0, valid=True):
    logprobs = [-0.1 * token for token in completion]
    return Rollout(prompt, seen or prompt, Completion(completion, logprobs, finish), advantage, valid)


def test_completions_are_marked_and_carry_the_samplers_log_probs():
    items = [rollout([5, 6], [7, 8, 9], advantage=2.0), rollout([5], [7], advantage=-1.0)]
    (batch,) = rollout_batches(items, GRPO, PAD, micro_tokens=100)
    assert batch.ids.tolist() == [[5, 6, 7, 8, 9], [5, 7, PAD, PAD, PAD]]
    assert batch.loss_mask.tolist() == [[False, False, True, True, True], [False, True, False, False, False]]
    expected = torch.tensor([[0, 0, -0.7, -0.8, -0.9], [0, -0.7, 0, 0, 0]])
    torch.testing.assert_close(batch.sampler_logp, expected)
    assert batch.advantages.tolist() == [2.0, -1.0]
    assert batch.rollout is None and batch.old_logp is None and batch.where == GRPO


def test_two_contexts_mark_the_same_completion_tokens_in_the_same_order():
    rng = random.Random(1)
    items = []
    for i in range(17):
        prompt, completion = (
            [rng.randint(2, 50) for _ in range(rng.randint(1, 9))],
            [rng.randint(2, 50) for _ in range(rng.randint(1, 20))],
        )
        items.append(rollout(prompt, completion, seen=[99, 98, 97, *prompt] if i % 2 else None, advantage=float(i)))
    batches = rollout_batches(items, GRPO, PAD, micro_tokens=120)
    assert len(batches) > 2 and sum(map(len, batches)) == 17
    for batch in batches:
        assert batch.rollout is not None, "all batches do the same forwards when any context differs"
        assert batch.ids[batch.loss_mask].tolist() == batch.rollout.ids[batch.rollout.loss_mask].tolist()
        assert batch.loss_mask.sum(1).tolist() == batch.rollout.loss_mask.sum(1).tolist()
        assert torch.equal(batch.sampler_logp[batch.loss_mask], batch.rollout.sampler_logp[batch.rollout.loss_mask])
        assert torch.equal(batch.advantages, batch.rollout.advantages)
        assert batch.rollout.ids.numel() <= 120 and batch.rollout.rollout is None
        for row, (shown, seen) in enumerate(zip(batch.ids, batch.rollout.ids, strict=True)):
            item = items[int(batch.advantages[row])]
            assert shown[: len(item.prompt_ids)].tolist() == item.prompt_ids
            assert seen[: len(item.rollout_prompt_ids)].tolist() == item.rollout_prompt_ids


def test_rows_without_a_reward_are_left_out():
    items = [rollout([2, 3], [4]), rollout([2, 3], [5], advantage=math.nan, valid=False)]
    (batch,) = rollout_batches(items, GRPO, PAD, 100)
    assert batch.ids.tolist() == [[2, 3, 4]] and not batch.advantages.isnan().any()
    assert rollout_batches([items[1]], GRPO, PAD, 100) == []


def test_batches_move_with_their_twin():
    (batch,) = rollout_batches([rollout([2], [4], seen=[9, 2])], GRPO, PAD, 100)
    moved = batch.to("meta")
    assert moved.ids.is_meta and moved.rollout.ids.is_meta and moved.sampler_logp.is_meta


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I\u2019m really sorry, but that is not possible.",
        "Sorry, no.",
        "I'm sorry to hear that, but I can't help.",
        "Oh, sorry! That is beyond me.",
        "We are sorry for the trouble.",
        "I apologize, but this is not something to share.",
        "I must apologise for not answering.",
        "My sincere apologies; I have no answer.",
        "I cannot help you with that request.",
        "I can not do that.",
        "I can\u2019t assist with that.",
        "As an AI model, I cannot provide medical advice.",
        "Unfortunately, I can't possibly answer this.",
        "I won't explain how to do that.",
        "I won\u02bct.",
        "I will not take part in this.",
        "I must decline to answer.",
        "I must respectfully decline.",
        "I'm afraid I'm going to have to decline that.",
        "I refuse to answer.",
        "I'm unable to help with this.",
        "I am not able to say.",
        "That's not something I can help with.",
        "This request cannot be fulfilled.",
        "**I'm sorry**, but no.",
        "<think>\nshall I?\n</think>\n\nI cannot help with that.",
        "i 'm sorry , but i can not say that .",
    ],
)
def test_refusals_are_recognised(text):
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "One cannot overstate the value of sleep.",
        "I cannot overstate how much this helps.",
        "I can't stress enough that you should rest.",
        "I can't possibly overstate it.",
        "I could not agree more: rest first.",
        "I won't lie, this takes practice.",
        "You should apologize to your sister first.",
        "Say sorry and mean it.",
        "I\u2019m sorry to hear that your head hurts.",
        "I'm so sorry you're going through this.",
        "Sorry about your loss.",
        "If you cannot sleep, get up and read.",
        "I would not mix these two medicines.",
        "Drink water, rest, eat well, walk daily and call a doctor; I cannot say more.",
        "A sorry state of affairs, but it can be mended.",
        "",
        "   ",
    ],
)
def test_ordinary_answers_are_kept(text):
    assert not is_refusal(text)


def test_further_languages_and_own_patterns_can_be_added():
    assert not is_refusal("Es tut mir leid, das geht nicht.")
    both = [*REFUSALS["en"], *REFUSALS["de"], r"\bno comment\b"]
    assert is_refusal("Es tut mir leid, das geht nicht.", both) and is_refusal(
        "Ich kann dir dabei leider nicht helfen.", both
    )
    assert is_refusal("No comment.", both) and is_refusal("I cannot say.", both)
    assert not is_refusal("Ich kann das gut erklären.", both)
    assert is_refusal("Je ne peux pas vous aider.", REFUSALS["fr"]) and is_refusal(
        "Lo siento, no puedo.", REFUSALS["es"]
    )
    assert is_refusal("First of all, thank you for asking me this, but I cannot.", words=20)
