"""A sampler with weights of its own, as a server has, in this process: what it samples follows the last sync, not the live policy."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

from tiny_architectures import load

from rlsafe.engine.run.build import Resources
from rlsafe.rollouts import TransformersSampler
from rlsafe.types import Completion, PolicyWeights, Request, SamplingParams


def digest(policy: PolicyWeights) -> str:
    total = hashlib.sha256()
    for _, tensor in policy.merged_weights():
        total.update(tensor.detach().numpy().tobytes())
    return total.hexdigest()


class OwnWeights(TransformersSampler):
    """sampled: seed of each request -> digest of the weights that sampled it. before: called before each generation."""

    def __init__(self, model_dir: str, before: Callable[[Sequence[Request]], None] = lambda requests: None):
        super().__init__(load(model_dir, rank=None), model_dir)
        self.before, self.sampled, self.weights, self.busy = before, {}, "", 0

    def sync(self, policy: PolicyWeights) -> None:
        assert self.busy == 0, "the weights change while it samples"
        own = dict(self.policy.model.named_parameters())
        for name, tensor in policy.merged_weights():
            own[name].data.copy_(tensor)
        self.weights = digest(policy)

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Completion]:
        self.busy += 1
        self.before(requests)
        self.sampled |= {request.seed: self.weights for request in requests}
        completions = super().generate(requests, params)
        self.busy -= 1
        return completions


class Own(Resources):
    """Gives a run this sampler where its config names a server."""

    def __init__(self, before: Callable[[Sequence[Request]], None] = lambda requests: None):
        super().__init__()
        self.before = before

    def sampler(self, config, policy, steerable=False, warn=None):
        self.policy, self.made = policy, OwnWeights(config.model.name, self.before)
        self.made.sync(policy)
        return self.made
