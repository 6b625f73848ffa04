"""A client for chat endpoints with OpenAI's protocol, for rewards and judges. Faults are returned, not raised."""

from rlsafe.endpoints import background
from rlsafe.endpoints.client import Endpoint, open_endpoint
from rlsafe.endpoints.fences import fence_of, harmless
from rlsafe.endpoints.limits import estimate_tokens
from rlsafe.endpoints.replies import ChatRequest, Failure, Position, Reply, Result
from rlsafe.endpoints.settings import EndpointSettings, parse_settings
from rlsafe.endpoints.thoughts import SWITCH, thinks, without_thoughts
from rlsafe.endpoints.totals import Totals

__all__ = [
    "SWITCH",
    "ChatRequest",
    "Endpoint",
    "EndpointSettings",
    "Failure",
    "Position",
    "Reply",
    "Result",
    "Totals",
    "background",
    "estimate_tokens",
    "fence_of",
    "harmless",
    "open_endpoint",
    "parse_settings",
    "thinks",
    "without_thoughts",
]
