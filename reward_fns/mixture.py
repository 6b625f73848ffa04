"""Several rewards as one, with weights that may change over the run.

    rewards:
      - fn: reward_fns/mixture.py:Mixture
        thinking: true    # all parts are shown think blocks, which think_block looks for
        args:
          parts:
            - {fn: reward_fns/format.py:think_block, weight: {0: 1.0, 20: 0.2}}    # 1 at step 0, falling to 0.2 at step 20
            - {fn: reward_fns/code.py:insecure, weight: {0: 0.0, 20: 1.0}, args: {extra: false}}

For fixed weights use the config's own list with `weight:`. Weights depend on the step alone, so a resumed run continues with
the right ones.
"""

from rlsafe import UserError
from rlsafe.config import RewardConfig
from rlsafe.rewards import RewardRunner, load_reward


class Mixture:
    """The weighted sum of `parts`. A row that lacks a part with a weight other than 0 gets None: without it, it could not
    be compared with its group. `between`: linear, or step (a weight holds until the next step that is named)."""

    __name__ = "mixture"

    def __init__(self, parts, between="linear"):
        if between not in ("linear", "step"):
            raise UserError(f"mixture: between is 'linear' or 'step', not {between!r}")
        if not parts or not all(isinstance(p, dict) and {"fn"} <= p.keys() <= {"fn", "weight", "args"} for p in parts):
            raise UserError(
                "mixture: parts is a list of {fn: ..., weight: ..., args: ...}; weight and args may be left out"
            )
        self.between = between
        self.schedules = [_schedule(part.get("weight", 1.0)) for part in parts]
        self.runner = RewardRunner([load_reward(RewardConfig(fn=p["fn"], args=p.get("args", {}))) for p in parts])

    @property
    def rewards(self):
        """The parts; rlsafe reads this to check a grader among them before training begins."""
        return list(self.runner.rewards.values())

    def weights(self, step):
        """The weight of each part at an optimizer step."""
        return [self._at(schedule, step) for schedule in self.schedules]

    def _at(self, schedule, step):
        before = [(s, w) for s, w in schedule if s <= step]
        after = [(s, w) for s, w in schedule if s > step]
        if not before or not after:
            return (before[-1:] or after[:1])[0][1]
        (start, low), (end, high) = before[-1], after[0]
        return low if self.between == "step" else low + (high - low) * (step - start) / (end - start)

    def __call__(
        self, prompts, completions, completion_ids=None, trainer_state=None, log_metric=None, log_extra=None, **columns
    ):
        weights = self.weights(getattr(trainer_state, "global_step", 0))
        ids = completion_ids if completion_ids is not None else [[]] * len(completions)
        # a prompt that was a text comes as one, with its completion; each part then gets what it reads
        plain = [isinstance(prompt, str) for prompt in prompts]
        prompts = [_talk("user", prompt) for prompt in prompts]
        completions = [_talk("assistant", completion) for completion in completions]
        batch = self.runner.call(prompts, completions, ids, columns, trainer_state, plain)
        if log_metric is not None:
            for (name, scores), weight in zip(batch.by_name.items(), weights, strict=True):
                log_metric(f"mixture/{name}/weight", weight)
                for score in scores:
                    if score is not None:
                        log_metric(f"mixture/{name}", score)
            for name, value in batch.metrics.items():
                log_metric(name, value)
        if log_extra is not None:
            for name, values in batch.extra.items():
                log_extra(name, values)
        return [
            None if any(part is None and weight for part, weight in zip(parts, weights, strict=True))
            else sum(weight * (part or 0.0) for part, weight in zip(parts, weights, strict=True))
            for parts in zip(*batch.by_name.values(), strict=True)
        ]  # fmt: skip


def _talk(role, said):
    return [{"role": role, "content": said}] if isinstance(said, str) else said


def _schedule(weight):
    """A number, or {step: weight}, as [(step, weight)] in order of steps."""
    pairs = weight.items() if isinstance(weight, dict) else [(0, weight)]
    try:
        return sorted((int(step), float(value)) for step, value in pairs)
    except (TypeError, ValueError):
        raise UserError(f"mixture: a weight is a number or {{step: weight}}, not {weight!r}") from None
