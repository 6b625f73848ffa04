"""What makes a finished cell stale and what does not, and what one failure costs."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from synthetic_comparison import CONFIG
from tiny import save_tiny_model

from rlsafe.compare.grid.grid import expand
from rlsafe.compare.grid.records import Directory
from rlsafe.compare.run.workers import DIED, run_in_workers
from rlsafe.config import load_compare
from rlsafe.config.steady import printed
from rlsafe.evaluate.measure import hashing
from rlsafe.types import Question, RunError, register_provider


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def rewrite(path: Path) -> None:
    """Other bytes under the same size and modification time."""
    about, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (about.st_size, about.st_mtime_ns)


# ------------------------------------------------------------------------------------------------ what makes a cell stale


@pytest.mark.parametrize("place", ["model.name", "defense", "model.adapter", "reference"])
def test_weights_rebuilt_under_their_old_name_make_cells_stale(tmp_path, place):
    models = {name: save_tiny_model(tmp_path / name, hidden_size=16, intermediate_size=16) for name in "ab"}
    kl = {"defense": f"safelora: {{base: {models['b']}}}", "reference": f'kl: {{reference: "path:{models["b"]}"}}'}
    text = CONFIG.replace("name: tiny", f"name: {models['b'] if place == 'model.name' else models['a']}")
    text = text.replace("kl: {weight: 0.3}", kl.get(place, "kl: {weight: 0.3}"))
    if place == "model.adapter":
        text = text.replace("model: {", f"model: {{adapter: {models['b']}, ")
    (tmp_path / "c.yaml").write_text(text)

    def fingerprints():
        return {
            cell.id: cell.fingerprint for cell in expand(load_compare(tmp_path / "c.yaml"), paths=["sft"], seeds=[0])
        }

    first = fingerprints()
    assert fingerprints() == first
    rewrite(Path(models["b"]) / "model.safetensors")
    changed = {id for id, now in fingerprints().items() if now != first[id]}
    named = {id for id in first if place.startswith("model.") or "kl" in id}
    assert changed == named and changed


def test_a_provider_s_models_and_rows_are_part_of_the_fingerprint(tmp_path, monkeypatch):
    from rlsafe.types import register_provider

    class World:
        rows_now = [{"messages": []}]

        def model(self, spec):
            return str(tmp_path / "m")

        def rows(self, spec):
            return self.rows_now

        def __getattr__(self, name):
            def unknown(spec):
                from rlsafe.config import UserError

                raise UserError(f"no {name}")

            return unknown

    world = World()
    register_provider("world", world)
    save_tiny_model(tmp_path / "m", hidden_size=16, intermediate_size=16)
    first = hashing.digest({"model": "world:aligned"})
    assert hashing.digest({"model": "world:aligned"}) == first != hashing.digest({"model": "world:other"})
    rewrite(tmp_path / "m" / "model.safetensors")
    second = hashing.digest({"model": "world:aligned"})
    assert second != first
    world.rows_now = [{"messages": ["changed"]}]
    hashing._texts.cache_clear()
    assert hashing.digest({"model": "world:aligned"}) != second


def test_what_a_provider_gives_has_one_fingerprint_in_every_process():
    """Functions, objects and generators print an address and sets any order: finished runs were all trained again. Where nothing does,
    the fingerprint is that of what Python prints, as before."""
    plain = [{"messages": [{"role": "user", "content": "at 0x1f"}], "n": (1, None, 2.5), "q": Path("a")}]
    assert printed(plain) == repr(plain)

    def rows(numbers, level=1):
        yield {"messages": [], "check": lambda: 0, "picture": object(), "tags": [set(numbers)], "level": level}

    assert repr({0, 8}) != repr({8, 0})
    assert printed(rows([0, 8])) == printed(rows([8, 0]))
    assert len({printed(rows([0, 8])), printed(rows([0, 9])), printed(rows([0, 8], 2))}) == 3
    one, other = (Question("q", (f"stack at {where}",), meta={"check": object()}) for where in ("0x7f", "0x1"))
    assert printed([one]) != printed([other])  # an object in a question does not hide its text
    assert printed([one]) == printed([dataclasses.replace(one, meta={"check": object()})])
    register_provider("yields", SimpleNamespace(rows=lambda spec: rows([0, 8])))
    first = hashing.contents("yields:x")
    hashing._texts.cache_clear()
    assert len(first) == 1 and hashing.contents("yields:x") == first


def test_a_large_file_is_read_once_and_again_when_it_changed(tmp_path, monkeypatch):
    file, reads = tmp_path / "weights.safetensors", []
    file.write_bytes(b"x" * (2 << 20))
    real = hashing.hashlib.file_digest
    monkeypatch.setattr(hashing.hashlib, "file_digest", lambda f, how: reads.append(1) or real(f, how))
    first = hashing.file_hash(file)
    hashing.file_hash(file)
    assert len(reads) == 2  # too new to be remembered: a write in the same instant would go unseen
    monkeypatch.setattr("rlsafe.config.files.SETTLED", -1.0)
    assert [hashing.file_hash(file) for _ in range(3)] == [first] * 3 and len(reads) == 3
    rewrite(file)
    assert hashing.file_hash(file) != first


def test_plain_words_and_other_directories_are_no_content(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "notes.json").write_text("{}")
    assert [hashing.contents(text) for text in ("sft", "none", "", "unknown:spec", "two\nlines", "x" * 2000)] == [
        []
    ] * 6


def test_eps_changes_the_scores_and_keeps_the_helpers(tmp_path):
    text = CONFIG.replace("  kl: [{kl: {weight: 0.3}}]", "  plus: [interleaving+: {scores: auto}]")
    text = (
        text.replace("{source: safe.jsonl}", "{source: safe.jsonl}") + "selection: {adapters: {legal: legal.jsonl}}\n"
    )

    def selection(eps):
        (tmp_path / "c.yaml").write_text(text.replace("legal.jsonl}", f"legal.jsonl}}, eps: {eps}"))
        cells = expand(load_compare(tmp_path / "c.yaml"), paths=["sft"], seeds=[0])
        return next(cell for cell in cells if cell.selections).selections[0]

    one, other = selection(1.0), selection(0.5)
    assert one.key != other.key and one.helpers_key == other.helpers_key


# ------------------------------------------------------------------------------------------------ processes that die


def work(cell, out: Path) -> None:
    """In a worker: a cell named `kl` takes its process with it, one named `once` only the first time."""
    directory = Directory(out)
    directory.write_record(cell, "running")
    first = not (mark := out / "died").exists()
    if cell.defense == "kl" or (cell.defense == "once" and first):
        mark.touch()
        os._exit(9)
    (directory.cell(cell.id) / "evaluation.json").write_text("{}")
    directory.write_record(cell, "done", 1.0)


@pytest.mark.integration  # its cells train in processes of their own
@pytest.mark.parametrize(("label", "lost"), [("kl", ["sft--kl--seed0"]), ("once", [])])
def test_a_process_that_dies_costs_the_cell_that_killed_it_only(tmp_path, label, lost):
    (tmp_path / "c.yaml").write_text(CONFIG.split("aligned:")[0].replace("  kl: [", f"  {label}: ["))
    cells = [c for c in expand(load_compare(tmp_path / "c.yaml"), paths=["sft"]) if c.seed == 0 or c.defense == "none"]
    directory, ended = Directory(tmp_path / "out"), []
    run_in_workers(work, cells, directory, 2, lambda cell: ended.append(cell.id))
    assert sorted(ended) == sorted(cell.id for cell in cells)
    records = {cell.id: json.loads((directory.cell(cell.id) / "cell.json").read_text()) for cell in cells}
    assert [id for id, record in records.items() if record["status"] == "failed"] == lost
    assert all(records[id]["error"] == DIED for id in lost)
    assert all(record["status"] == "done" for id, record in records.items() if id not in lost)


def dies(cell, out: Path) -> None:
    os._exit(9)


@pytest.mark.integration  # its cells train in processes of their own
def test_processes_that_die_before_a_cell_began_end_the_comparison(tmp_path):
    (tmp_path / "c.yaml").write_text(CONFIG.split("aligned:")[0])
    cells = expand(load_compare(tmp_path / "c.yaml"), paths=["sft"], seeds=[0])
    with pytest.raises(RunError, match="died before any cell began"):
        run_in_workers(dies, cells, Directory(tmp_path / "out"), 2, lambda cell: None)
