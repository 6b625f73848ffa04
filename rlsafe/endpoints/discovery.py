"""What an endpoint says of itself, for messages that name what would have worked."""

from __future__ import annotations

import asyncio
from typing import Any

SECONDS = 5.0


async def served_names(client: Any) -> list[str]:
    """Ids of `GET /models`, in the server's order; none when there is no such list (an error must not hide another).

    client: an `openai.AsyncOpenAI`.
    """
    try:
        async with asyncio.timeout(SECONDS):
            page = await client.models.list()
        return [str(model.id) for model in page.data]
    except Exception:  # whatever it is, the caller has something more important to say
        return []
