"""Keeping vLLM's start-up noise off the terminal without hiding our own progress display."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

LOGGERS = ("vllm", "torch.distributed", "torch._library.triton", "transformers")


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, libraries log errors only, Python warnings are off, and what C++ writes to file descriptor 2 is dropped.

    `sys.stderr` goes on to the terminal. The vllm logger stays at errors afterwards.
    """
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    sys.stderr.flush()
    terminal, stderr = os.dup(2), sys.stderr
    with warnings.catch_warnings(), tempfile.TemporaryFile() as sink, os.fdopen(os.dup(2), "w") as python_stderr:
        warnings.simplefilter("ignore")
        os.dup2(sink.fileno(), 2)
        sys.stderr = python_stderr
        try:
            yield
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)
            sys.stderr = stderr
            for name in LOGGERS[1:]:
                logging.getLogger(name).setLevel(levels[name])
