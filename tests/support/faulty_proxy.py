"""A proxy on loopback that stands before a real endpoint and breaks a share of its replies, by a seeded draw."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections import Counter
from collections.abc import Iterator
from itertools import cycle

from aiohttp import ClientError, ClientSession, TCPConnector, web

FAULTS = ("500", "429", "timeout", "truncated", "no_logprobs", "wrong_model", "no_such_model")


class FaultyProxy:
    """`share` of the requests meet a fault, each kind as often; `counts` holds how often each was given ("passed": none).

    slow: seconds by which every reply is held back. hang: how long a "timeout" keeps its client waiting.
    """

    def __init__(self, target: str, share: float = 0.3, seed: int = 0, slow: float = 0.0, hang: float = 3.0):
        self.target, self.slow, self.hang = target, slow, hang
        self.counts: Counter[str] = Counter()
        self.most_at_once = self._at_once = 0  # requests held back by `slow` together
        self._faults = deal(share, seed)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> FaultyProxy:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(20)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    async def _start(self) -> None:
        self._session = ClientSession(connector=TCPConnector(force_close=True))
        self._closing = self._loop.create_future()
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._reply)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.base_url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}/v1"  # type: ignore[union-attr]

    async def _stop(self) -> None:
        self._closing.set_result(None)
        await self._session.close()
        await self._runner.cleanup()

    async def _reply(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        fault = next(self._faults)
        if fault == "no_logprobs" and "top_logprobs" not in json.loads(body):
            fault = "passed"
        self.counts[fault] += 1
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        await asyncio.sleep(self.slow)
        self._at_once -= 1
        if fault == "500":
            return web.json_response({"error": {"message": "internal"}}, status=500)
        if fault == "429":
            return web.json_response({"error": {"message": "slow down"}}, status=429, headers={"Retry-After": "0.2"})
        if fault == "no_such_model":
            return web.json_response({"error": {"message": "the model does not exist"}}, status=404)
        if fault == "timeout":
            await asyncio.wait([self._closing], timeout=self.hang)
            return web.Response(status=504)
        try:
            async with self._session.post(f"{self.target}/chat/completions", data=body, headers=_json()) as reply:
                content, status = await reply.read(), reply.status
        except ClientError as error:
            self.counts["502"] += 1
            return web.json_response({"error": {"message": str(error)}}, status=502)
        if fault == "truncated":
            content = content[: len(content) // 2]
        elif fault in ("no_logprobs", "wrong_model") and status == 200:
            tree = json.loads(content)
            if fault == "wrong_model":
                tree["model"] = "another"
            for choice in tree["choices"]:
                choice["logprobs"] = None if fault == "no_logprobs" else choice["logprobs"]
            content = json.dumps(tree).encode()
        return web.Response(body=content, status=status, headers=_json())


def deal(share: float, seed: int) -> Iterator[str]:
    """Of every ten requests exactly `share` meet a fault, in a seeded order; the kinds take turns."""
    rng, kinds = random.Random(seed), cycle(FAULTS)
    while True:
        ten = [index < round(10 * share) for index in range(10)]
        rng.shuffle(ten)
        yield from (next(kinds) if broken else "passed" for broken in ten)


def _json() -> dict[str, str]:
    return {"Content-Type": "application/json"}
