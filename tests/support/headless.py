"""A headless Chromium over its DevTools protocol, for tests of pages. Only what they need: open, measure, press, capture."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import subprocess
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import websockets

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = os.environ.get("CHROMIUM") or next((found for name in NAMES if (found := shutil.which(name))), None)


class Page:
    """One tab. `at` opens a file at a width in CSS pixels and in a colour scheme; `js` evaluates an expression."""

    def __init__(self, profile: Path):
        assert BROWSER is not None
        self.process = subprocess.Popen(
            [
                BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0",
                f"--user-data-dir={profile}", "about:blank",
            ],
            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert self.process.stderr is not None
        line = next(line for line in self.process.stderr if "DevTools listening on" in line)
        self.loop = asyncio.new_event_loop()
        self.number = 0
        self.events: list[dict[str, Any]] = []
        self.session = ""
        self.socket: Any = self._await(websockets.connect(line.split()[-1], max_size=None))
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self(f"{domain}.enable")

    def _await(self, what: Any) -> Any:
        async def wait() -> Any:
            return await asyncio.wait_for(what, 300)

        work: Coroutine[Any, Any, Any] = wait()
        return self.loop.run_until_complete(work)

    def __call__(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        request = {"id": self.number, "method": method, "params": params}
        self._await(self.socket.send(json.dumps(request | ({"sessionId": self.session} if self.session else {}))))
        while True:
            message = self._receive()
            if message.get("id") == self.number:
                assert "error" not in message, message
                return message["result"]

    def _receive(self) -> dict[str, Any]:
        message = json.loads(self._await(self.socket.recv()))
        if "method" in message:
            self.events.append(message)
        return message

    def at(self, file: Path, width: int, scheme: str = "light") -> Page:
        self(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=800,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        self("Page.navigate", url=file.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._receive()
        return self

    def js(self, expression: str) -> Any:
        result = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def press(self, key: str) -> None:
        code = {"Tab": 9, "Enter": 13}[key]
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)

    def capture(self, out: Path, whole: bool = True) -> None:
        """A PNG of the page."""
        out.write_bytes(base64.b64decode(self("Page.captureScreenshot", captureBeyondViewport=whole)["data"]))

    def close(self) -> None:
        self._await(self.socket.close())
        self.loop.close()
        self.process.terminate()
        self.process.wait(300)
