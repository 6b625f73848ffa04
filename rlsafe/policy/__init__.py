"""The model: loading, one shared forward, frozen references, the residual stream, weights for samplers."""

from rlsafe.policy.plan import Forwarded, ForwardPlan, Frozen
from rlsafe.policy.policy import Policy
from rlsafe.policy.scoring import mean_nll, nll
from rlsafe.policy.taps import Handle

__all__ = ["ForwardPlan", "Forwarded", "Frozen", "Handle", "Policy", "mean_nll", "nll"]
