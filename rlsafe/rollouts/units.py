"""Which tensors of a model vLLM has to be given together: those that it fuses into one."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from torch import Tensor

IN_BLOCK = re.compile(r".*?\.\d+\.[^.]+")  # a decoder block's attention, MLP or norm
Units = dict[str, dict[str, Callable[[], Tensor]]]
"""{unit: {tensor's name: how to read it}}"""


def unit_of(name: str) -> str:
    """The part of the model that has to be loaded together with this tensor.

    vLLM fuses projections within a block's attention or MLP (experts included) and loads a fused tensor only as a whole: what is
    missing of it would be whatever the memory held. Outside the blocks the part is the module.
    """
    block = IN_BLOCK.match(name)
    return block[0] if block else name.rpartition(".")[0]


def checkpoint(paths: Sequence[Path], files: ExitStack) -> Units:
    """The tensors of a model's .safetensors files, which for a large model take seconds to read; `files` keeps them open."""
    from safetensors import safe_open

    units: Units = {}
    for path in paths:
        tensors = files.enter_context(safe_open(str(path), framework="pt"))
        for name in tensors.keys():  # noqa: SIM118 (no mapping)
            units.setdefault(unit_of(name), {})[name] = partial(tensors.get_tensor, name)
    return units


def whole_units(
    changed: Iterator[tuple[str, Tensor]], base: Units, noted: Callable[[str], None] = lambda unit: None
) -> Iterator[tuple[str, Tensor]]:
    """The changed tensors [any shape], in their order, each unit made whole with the checkpoint's other tensors of it. noted: called
    with each unit before its first tensor."""
    seen: set[str] = set()
    for unit, tensors in itertools.groupby(changed, key=lambda named: unit_of(named[0])):
        assert unit not in seen, f"{unit} comes twice"
        seen.add(unit)
        noted(unit)
        others = dict(base.get(unit, {}))
        for name, tensor in tensors:
            others.pop(name, None)
            yield name, tensor
        yield from ((name, read()) for name, read in others.items())
