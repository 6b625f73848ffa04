"""Weights reach the sampler late: an update only marks it stale, and the next `synced` hands over the weights. This is the only place
that starts or syncs a sampler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rlsafe.data import Stream, encode_prompt, split_prompt
from rlsafe.policy import Policy
from rlsafe.rollouts import gap_limit, self_test
from rlsafe.types import RunError, Sampler


class SyncedSampler:
    """The run's sampler, started on first use and synced when it is asked for and the weights have changed since the last sync.

    make: starts the sampler, with the policy's current weights. test: compare the sampler's log-probs with the trainer's at the
    start and after the first update (with test_always after every sync: a server may fail later). wait_first: called before a sync,
    to wait for other threads that still sample with the old weights.
    """

    def __init__(
        self,
        make: Callable[[], Sampler],
        policy: Policy,
        streams: dict[str, Stream],
        *,
        seed: int,
        test: bool,
        test_always: bool = False,
        max_gap: float | None = None,
        wait_first: Callable[[], None] | None = None,
    ):
        self._make, self._policy, self._streams = make, policy, streams
        self._seed, self._test, self._test_always, self._max_gap = seed, test, test_always, max_gap
        self._limit = gap_limit(policy, max_gap)
        self.wait_first = wait_first
        self._sampler: Sampler | None = None
        self.stale = True  # the sampler does not have the current weights
        self.tests = 0  # self-tests done

    def weights_changed(self) -> None:
        """Note that the sampler's weights are old now: `synced` will sync it."""
        self.stale = True

    def resumed(self, tests: int) -> None:
        """Start from a checkpoint, whose run had done `tests` self-tests and has left no sampler."""
        self.tests, self.stale = tests, True

    def synced(self) -> Sampler:
        """The sampler with the policy's current weights. RunError when its log-probs are not the policy's."""
        sampler, fresh = self._sampler, False
        # A GPU holds one colocated engine: another run may have closed this one since.
        if sampler is None or getattr(sampler, "closed", False):
            sampler, fresh = self._make(), True
            self._sampler = sampler
        if self.stale:
            if self.wait_first:
                self.wait_first()
            if not fresh:
                sampler.sync(self._policy)
            self.stale = False
            if self._test and (self.tests < 2 or self._test_always):
                self._compare()
        return sampler

    @contextmanager
    def at(self, reference: str) -> Iterator[Sampler]:
        """The sampler with the weights of a reference of the policy; the current ones are synced again on next use."""
        self.stale = True
        try:
            with self._policy.at(reference):
                yield self.synced()
        finally:
            self.stale = True

    def check_gap(self, step: int, gap: float) -> None:
        """RunError when the rollouts of a step were not the policy's: its log-probs and the sampler's differ by `gap`, in nats a
        token, although both saw the same context and distribution."""
        if self._test and gap > self._limit:
            raise RunError(
                f"step {step}: sampler and trainer disagree by {gap:.3g} nats a token (limit {self._limit:.3g}): the rollouts "
                "are not the policy's. Did the model's files change? sampler.max_gap sets the limit"
            )

    def _compare(self) -> None:
        assert self._sampler is not None
        rows = next((stream.rows[:4] for stream in self._streams.values()), [])
        asked = [split_prompt(row)[0] for row in rows] or [[{"role": "user", "content": "Hello"}]]
        prompts = [encode_prompt(self._policy.tokenizer, messages) for messages in asked]
        when = "at the start" if self.tests == 0 else f"after sync {self.tests}"
        self_test(self._sampler, self._policy, prompts, self._seed, self._max_gap, when)
        self.tests += 1
