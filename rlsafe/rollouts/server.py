"""Rollouts by vLLM servers in other processes or on other hosts.

LoRA: each sync saves the adapter where the servers can read it and loads it over HTTP under a new name. A server then cannot
reuse what it cached for an earlier adapter. Full weights go through TRL's vLLM client (NCCL, GPUs only), whole units at a time.
"""

from __future__ import annotations

import hashlib
import itertools
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rlsafe.config import UserError, first_line
from rlsafe.rollouts import ranks
from rlsafe.rollouts.engine import weight_files
from rlsafe.rollouts.remote import START, START_MERGED, Forgotten, Server, Unreachable
from rlsafe.rollouts.sampling import check_lengths, stop_token_ids
from rlsafe.rollouts.units import checkpoint, whole_units
from rlsafe.types import Completion, PolicyWeights, Request, RunError, SamplingParams

START_PATIENCE = 60.0  # seconds to wait for a server at the start of a run; shorter, because the address may be wrong
LEAST_TIMEOUT = 60.0  # seconds to wait for one answer; shorter ones would take a busy server for a dead one
CLOSING_TIMEOUT = 5.0  # seconds to wait for a server when the run is over
PAUSES = (0.2, 0.5, 1.0, 2.0, 5.0)  # seconds between tries; the last repeats
GROUP_PORT = 51216  # TRL's port for a server's weights; one more for each further server


@dataclass
class Adapter:
    """The adapter of the last sync. Its files stay until the next one: a restarted server needs them again."""

    name: str
    files: tempfile.TemporaryDirectory[str]


class ServerSampler:
    """Samples from vLLM servers. Requests are split over them; a failed request is repeated, on the next server too."""

    name = "server"

    def __init__(
        self,
        urls: Sequence[str],
        *,
        sync: Literal["merged", "adapter"] = "adapter",
        adapter_dir: str | None = None,
        patience: float = 600.0,
        max_num_seqs: int = 256,
        model_dir: str | None = None,
        tokenizer: Any = None,
        say: Callable[[str], None] | None = None,
    ):
        """Connect to every server; UserError when one does not answer or is no vLLM server.

        adapter_dir: a directory that the servers see under the same path; None = this machine's temporary directory.
        patience: seconds that a request or a sync waits for servers that do not answer. say: told about outages.
        """
        if sync == "merged" and not torch.cuda.is_available():
            raise UserError(
                "sampler.sync: merged: full weights reach a server through NCCL, which needs a GPU; use LoRA over an unquantised "
                "base (adapter)"
            )
        if adapter_dir is not None and not Path(adapter_dir).is_dir():
            raise UserError(f"sampler.adapter_dir: {adapter_dir}: no such directory")
        self._sync, self._adapter_dir, self._patience = sync, adapter_dir, patience
        self._concurrency, self._say = max_num_seqs, say or (lambda words: None)
        self.stop = stop_token_ids(model_dir, tokenizer)  # of each further policy: `make_sampler`
        self._files = weight_files(model_dir or "") if sync == "merged" else []
        self._start = START_MERGED if sync == "merged" else START
        self._adapter: Adapter | None = None
        self._stopping = threading.Event()
        self._clients: list[Any] = []
        self.retries = 0  # failed tries since the sampler was made
        self._servers = [Server(url, max(patience, LEAST_TIMEOUT)) for url in urls]
        for server in self._servers:
            self._connect(server)
        self.max_model_len = min(server.max_model_len or 0 for server in self._servers)

    @property
    def merges(self) -> bool:
        """Whether whole weights are synced, not an adapter."""
        return self._sync == "merged"

    def _connect(self, server: Server) -> None:
        deadline = time.monotonic() + min(self._patience, START_PATIENCE)
        for attempt in itertools.count():
            try:
                return server.connect()
            except Unreachable as error:
                self.retries += 1
                if time.monotonic() > deadline:
                    raise UserError(
                        f"sampler.urls: {server.url} does not answer ({error}); start it with: {self._start}"
                    ) from None
                if attempt == 0:
                    self._say(f"waiting for {server.url}")
                self._pause(attempt)

    # ---------------------------------------------------------------------------------------------- generation

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Completion]:
        """One completion per request, in order; neighbours (the samples of a prompt) go to the same server."""
        if not requests:
            return []
        check_lengths(requests, params, self.max_model_len, "the server (--max-model-len)")
        self._stopping.clear()
        share = len(requests) / len(self._servers)
        pool = ThreadPoolExecutor(min(len(requests), self._concurrency))
        try:
            futures = [pool.submit(self._complete, int(i / share), r, params) for i, r in enumerate(requests)]
            return [future.result() for future in futures]
        except BaseException:  # an interrupt, or a request that failed for good: stop the others
            self._stopping.set()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _complete(self, home: int, request: Request, params: SamplingParams) -> Completion:
        deadline = None
        for attempt in itertools.count():
            server = self._servers[(home + attempt) % len(self._servers)]
            try:
                self._ready(server)
                return server.complete(self._adapter.name if self._adapter else None, request, params, self.stop)
            except (Unreachable, Forgotten) as error:
                self.retries += 1
                deadline = deadline or time.monotonic() + self._patience
                self._give_up(deadline, server, error)
                if isinstance(error, Unreachable):
                    self._pause(attempt // len(self._servers))
        raise AssertionError("unreachable")

    def _ready(self, server: Server) -> None:
        """Load the current adapter unless the server has it: it may have been down at the sync, or restarted since."""
        if self._adapter is not None and server.holds != self._adapter.name:
            server.load(self._adapter.name, self._adapter.files.name)

    def _give_up(self, deadline: float, server: Server, error: Exception) -> None:
        if self._stopping.is_set() or time.monotonic() > deadline:
            raise RunError(f"{server.url} does not answer since {self._patience:g} s (sampler.patience): {error}")

    def _pause(self, attempt: int) -> None:
        self._stopping.wait(PAUSES[min(attempt, len(PAUSES) - 1)])

    # ------------------------------------------------------------------------------------------------- weights

    def sync(self, policy: PolicyWeights) -> None:
        """Give the policy's current weights to every server that answers; to the others before their next request."""
        if self._sync == "merged":
            return self._push(policy)
        before, now = self._adapter, self._save(policy)
        if before is not None and before.name == now.name:  # unchanged: servers may still read these files
            return now.files.cleanup()
        self._adapter = now
        self._stopping.clear()
        deadline = time.monotonic() + self._patience
        for attempt in itertools.count():
            loaded, trouble = 0, None
            for server in self._servers:
                try:
                    self._ready(server)
                    loaded += 1
                except Unreachable as error:
                    trouble = (server, error)
            if loaded:
                break
            assert trouble is not None
            self.retries += 1
            self._give_up(deadline, *trouble)
            self._say(f"waiting for {trouble[0].url}")
            self._pause(attempt)
        if before is not None:
            self._forget(before)

    def reset(self) -> None:
        """Sample from the model without the adapter from now on. UserError for full weights, which stay on the server."""
        if self._sync == "merged":
            raise UserError("sampler.sync: a server that was sent full weights cannot go back to its own; restart it")
        before, self._adapter = self._adapter, None
        if before is not None:
            self._forget(before)

    def _save(self, policy: PolicyWeights) -> Adapter:
        """Save the adapter under a name made of a hash of its content, so that all processes of a run use the same name."""
        files = tempfile.TemporaryDirectory(prefix="rlsafe-adapter-", dir=self._adapter_dir)
        policy.save_adapter(files.name)
        Path(files.name).chmod(0o755)  # the server may run as another user
        weights = Path(files.name, "adapter_model.safetensors").read_bytes()
        settings = Path(files.name, "adapter_config.json").read_bytes()
        return Adapter("rlsafe-" + hashlib.sha256(weights + settings).hexdigest()[:16], files)

    def _forget(self, adapter: Adapter) -> None:
        for server in self._servers:
            try:
                server.unload(adapter.name)
            except Unreachable:
                continue  # down: after a restart it holds nothing
        adapter.files.cleanup()

    def _push(self, policy: PolicyWeights) -> None:
        """Freshly merged tensors, one at a time; vLLM reloads between the start and the finish of an update. Of several processes
        the first one sends; the others make the tensors with it, which gathers shards."""
        first = ranks.is_first()
        if not self._clients:
            self._clients = ranks.together(
                self._join if first else lambda: [None] * len(self._servers), lambda clients: None
            )
        for client in self._clients:
            weights = policy.merged_weights()
            if client is None:
                for _ in weights:
                    pass
                continue
            with client.weight_update(), ExitStack() as files:
                for name, tensor in whole_units(weights, checkpoint(self._files, files)):
                    client.update_named_param(
                        name, tensor.cuda()
                    )  # read from a file, or of shards that rest in host memory
            client.reset_prefix_cache()
        if ranks.world() > 1:
            torch.distributed.barrier()

    def _join(self) -> list[Any]:
        """A client for each server, in a process group with it. UserError when a server, or what is installed here, cannot."""
        clients = []
        for number, server in enumerate(self._servers):
            try:
                from trl.generation.vllm_client import VLLMClient

                client = VLLMClient(base_url=server.url, group_port=GROUP_PORT + number)
                client.init_communicator(torch.cuda.current_device())
            except Exception as error:  # whatever HTTP, NCCL or a missing package raises
                raise UserError(
                    f"sampler.urls: {server.url} takes no full weights: {first_line(error)}; start it with: {START_MERGED}"
                ) from None
            clients.append(client)
        return clients

    def steer(self, additions: Mapping[int, Tensor] | None) -> None:
        """UserError for any vectors [H]: the residual stream of another process cannot be changed. None does nothing."""
        if additions:
            raise UserError(CANNOT_STEER)

    def close(self) -> None:
        """Unload the adapter from the servers that answer within seconds. The servers go on running."""
        self._stopping.set()
        adapter, self._adapter = self._adapter, None
        if adapter is None:
            return
        for server in self._servers:
            if server.holds == adapter.name:
                with suppress(Unreachable, RunError, UserError):
                    server.unload(adapter.name, CLOSING_TIMEOUT)
        adapter.files.cleanup()


CANNOT_STEER = "sampler.kind: server: rollouts on a server cannot be steered; use sampler.kind=vllm, or persona with rollouts: false"
