"""An async reward: every completion is scored at the same time. Copy it and put your service into `score`.

    rewards: [{fn: reward_fns/remote.py:remote, args: {at_once: 32, seconds: 20}}]

As it stands, `score` measures how varied the words are, so that the file runs as it is.
"""

import asyncio


async def score(question, answer):
    """Replace this body: ask your service, return a number."""
    await asyncio.sleep(0)
    words = answer.lower().split()
    return len(set(words)) / len(words) if words else 0.0


async def remote(prompts, completions, at_once=16, seconds=30.0, log_metric=None, **columns):
    """Scores with at most `at_once` calls under way. A call that fails or takes longer than `seconds` gives None: the
    row is left out of the update instead of counting as a bad answer."""
    slots = asyncio.Semaphore(at_once)

    async def one(prompt, completion):
        async with slots:
            try:
                return await asyncio.wait_for(score(prompt[-1]["content"], completion[0]["content"]), seconds)
            except (TimeoutError, OSError):
                return None

    rewards = await asyncio.gather(*(one(p, c) for p, c in zip(prompts, completions, strict=True)))
    if log_metric is not None:
        log_metric("remote_failed", sum(reward is None for reward in rewards) / max(1, len(rewards)))
    return list(rewards)
