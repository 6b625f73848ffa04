"""Replies of models that think aloud before they answer: what is left of them, and how that is switched off."""

from __future__ import annotations

import re

from rlsafe.endpoints.replies import Reply

SWITCH = "extra_body: {chat_template_kwargs: {enable_thinking: false}}"
"""For Qwen3, GLM and others behind vLLM or SGLang."""
OPENED = re.compile(r"\s*(?:<(?:think|thinking|thought|reasoning)>|\[THINK\])")
CLOSED = re.compile(r".*(?:</(?:think|thinking|thought|reasoning)>|\[/THINK\])", re.DOTALL)


def thinks(reply: Reply) -> bool:
    """Whether the reply begins with a think block, or is one that the server keeps to itself: nothing is left but its cost."""
    hidden = not reply.text.strip() and reply.finish == "length"
    return hidden or OPENED.match(reply.text) is not None or CLOSED.match(reply.text) is not None


def without_thoughts(text: str) -> str | None:
    """What follows the think block (which the template may have opened); None when it has no end."""
    if closed := CLOSED.match(text):
        return text[closed.end() :]
    return None if OPENED.match(text) else text
