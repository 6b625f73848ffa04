"""What must not be written down or printed: values of secret environment variables, and where a user's home is."""

from __future__ import annotations

import os
import re
from pathlib import Path

_NAMES = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
_SHAPES = re.compile(r"\b(?:sk|hf|ghp|gho|xoxb)[-_][A-Za-z0-9_-]{16,}|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")
"""Keys as the usual services hand them out, and `user:password` in an address."""
SHORTEST = 8  # characters: shorter values are words that occur by chance


def scrub(text: str) -> str:
    """`text` with every secret as `***` and the home directory as `~`: for records that are passed on."""
    text = scrub_secrets(text)
    home = str(Path.home())
    return text.replace(home + os.sep, "~" + os.sep) if len(home) > 1 else text


def scrub_secrets(text: str) -> str:
    """`text` with every secret as `***`: for messages, whose paths must stay what they are."""
    for name, value in os.environ.items():
        if len(value) >= SHORTEST and _NAMES.search(name):
            text = text.replace(value, "***")
    return _SHAPES.sub("***", text)
