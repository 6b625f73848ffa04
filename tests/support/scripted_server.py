"""A small HTTP server on loopback that replies as a test's script says: for edge cases of the protocol."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from rlsafe.endpoints import ChatRequest, Endpoint, EndpointSettings

Answer = tuple[int, dict[str, str], bytes]
"""(status, headers, body)"""


def completion(text: str, model: str = "judge", top: dict[str, float] | None = None, **more: Any) -> dict[str, Any]:
    """A chat completion as JSON; `top` are the log-probs of the first token's alternatives."""
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    if top is not None:
        alternatives = [{"token": token, "logprob": logprob, "bytes": None} for token, logprob in top.items()]
        choice["logprobs"] = {"content": [{"token": text, "logprob": 0.0, "bytes": None, "top_logprobs": alternatives}]}
    usage = {"prompt_tokens": 10, "completion_tokens": 1, "total_tokens": 11}
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": model,
        "choices": [choice],
        "usage": usage,
    } | more


def ok(text: str, **more: Any) -> Answer:
    return 200, {}, json.dumps(completion(text, **more)).encode()


def error(status: int, message: str = "broken", **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return status, named, json.dumps({"error": {"message": message, "type": "x", "code": None}}).encode()


class ScriptedServer:
    """`script(number, body)` gives the answer to request `number` (from 0); it may sleep. `requests` holds (headers, body).
    models: the names that GET /models lists."""

    def __init__(self, script: Callable[[int, dict[str, Any]], Answer], models: Sequence[str] = ()):
        self.requests: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.most_at_once = self._at_once = 0
        lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    number = len(outer.requests)
                    outer.requests.append(({k.lower(): v for k, v in self.headers.items()}, body))
                    outer._at_once += 1
                    outer.most_at_once = max(outer.most_at_once, outer._at_once)
                try:
                    try:
                        status, headers, content = script(number, body)
                    finally:  # before the client hears of it, who may then ask again
                        with lock:
                            outer._at_once -= 1
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    for name, value in headers.items():
                        self.send_header(name, value)
                    if "Content-Length" not in headers:
                        self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                    self.close_connection |= "Content-Length" in headers  # a body cut short
                except OSError:
                    pass  # the client hung up

            def do_GET(self) -> None:
                content = json.dumps({"object": "list", "data": [{"id": name} for name in models]}).encode()
                self.send_response(200 if models else 404)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: Any) -> None:  # a client that hung up
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.base_url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def __enter__(self) -> ScriptedServer:
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()


def endpoint(server, **settings):
    url = server if isinstance(server, str) else server.base_url
    defaults = {"model": "judge", "base_url": url, "cache": None, "backoff": 0.01, "timeout": 5, "deadline": 10}
    return Endpoint(EndpointSettings.model_validate(defaults | settings))


def request(text="hello", **more):
    return ChatRequest([{"role": "user", "content": str(text)}], max_tokens=1, **more)
