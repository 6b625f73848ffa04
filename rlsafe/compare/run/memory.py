"""Peak memory of a run: of the GPU where there is one, else of this process (the sampler's engine lives in it)."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak:
    """Measure from construction on; `read()` gives {"peak_memory": bytes, "memory_of": "GPU" | "process"}.

    {} where neither can be measured. On a CPU Linux resets the process's high-water mark, so one run in a process that has
    run others is measured on its own, on top of what stays loaded between runs.
    """

    def __init__(self) -> None:
        torch = sys.modules.get("torch")
        self.cuda = torch.cuda if torch is not None and torch.cuda.is_available() else None
        self.resets = True
        if self.cuda is not None:
            self.cuda.reset_peak_memory_stats()
            return
        try:
            _RESET.write_text("5")
        except OSError:
            self.resets = False

    def read(self) -> dict[str, Any]:
        if self.cuda is not None:
            return {"peak_memory": int(self.cuda.max_memory_allocated()), "memory_of": "GPU"}
        try:
            found = re.search(r"^VmHWM:\s+(\d+) kB", _STATUS.read_text("utf-8"), re.M)
        except OSError:
            found = None
        return {"peak_memory": int(found[1]) << 10, "memory_of": "process"} if found and self.resets else {}
