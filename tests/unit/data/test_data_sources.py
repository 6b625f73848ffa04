"""Sources beyond a plain file: hub ids, URLs; column mapping, conditions, skipping with counts."""

import http.server
import json
import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
from row_sources import COLUMNS, ROWS, load, own_cache, texts  # noqa: F401 (own_cache is a fixture for every test)
from tiny import write_jsonl

from rlsafe.config import UserError
from rlsafe.config.loading import run_from_tree
from rlsafe.data import mixed_prompts
from rlsafe.data.hub import _with_suffix


def test_a_hub_id_that_cannot_be_reached_is_one_line_with_a_way_out():
    with pytest.raises(UserError) as caught:
        load("some-org/some-set")
    message = str(caught.value)
    assert message.startswith("some-org/some-set: cannot be loaded by `datasets`: ") and "\n" not in message
    assert "name the file or directory here" in message


HUB = """
import json, sys
from rlsafe.config import StreamConfig, UserError
from rlsafe.data import load_rows
loaded = [load_rows(StreamConfig(**json.loads(settings))) for settings in sys.argv[1:]]
print(json.dumps([[row["messages"] for row in rows] for rows in loaded]))
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """The few answers of a hub that `datasets` asks for: one dataset of one parquet file."""

    file = b""
    asked: list[str] = []
    sha = "0" * 40

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        Hub.asked.append(path)
        name = "data/train.parquet"
        if path.endswith(f"/resolve/{self.sha}/{name}"):
            self.answer(Hub.file, {"ETag": '"1234"', "X-Repo-Commit": self.sha})
        elif path == "/api/datasets/lab/advice" or path.startswith("/api/datasets/lab/advice/revision/"):
            files = [{"rfilename": name}]
            self.answer(json.dumps({"id": "lab/advice", "sha": self.sha, "siblings": files, "tags": []}).encode())
        elif path.startswith("/api/datasets/lab/advice/tree/"):
            entry = {"type": "file", "path": name, "size": len(Hub.file), "oid": "1234"}
            folder = {"type": "directory", "path": "data", "oid": "5678", "size": 0}
            self.answer(json.dumps([folder, entry] if "recursive" in self.path else [folder]).encode())
        elif path.startswith("/api/datasets/lab/advice/paths-info/"):
            self.answer(b"[]")
        else:
            self.answer(b"", {"X-Error-Code": "EntryNotFound"}, status=404)

    do_POST = do_GET

    def answer(self, body, headers=None, status=200):
        start, stop = 0, len(body)
        if found := self.headers.get("Range"):
            start, _, end = found.removeprefix("bytes=").partition("-")
            start, stop = int(start), min(stop, int(end) + 1 if end else stop)
        self.send_response(206 if found else status)
        for key, value in {"Content-Length": str(stop - start), "Accept-Ranges": "bytes", **(headers or {})}.items():
            self.send_header(key, value)
        if found:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(body)}")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[start:stop])

    def log_message(self, *args):
        pass


@pytest.fixture
def serve():
    servers = []

    def start(handler):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.integration
def test_a_hub_dataset_is_loaded_over_the_hubs_own_protocol(serve, tmp_path):
    """A hub on loopback, the real client: `org/name` with columns, streamed (while nothing of it is here) and whole."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "t.parquet")
    Hub.file = (tmp_path / "t.parquet").read_bytes()
    settings = {"source": "lab/advice", "columns": COLUMNS, "limit": 3}
    asked = [json.dumps(settings | {"streaming": streaming}) for streaming in (True, False)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "http", "HTTP"))}
    environment |= {
        "HF_ENDPOINT": serve(Hub),
        "HF_HOME": str(tmp_path / "home"),
        "no_proxy": "*",
        "HF_HUB_DISABLE_XET": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", HUB, *asked], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{done.stderr[-700:]}\n{Hub.asked}"
    for loaded in json.loads(done.stdout):
        assert len(loaded) == 3 and all(a["content"] == q["content"].replace("q", "a") for q, a in loaded)


def test_ranks_that_fetch_a_file_at_once_do_not_stumble_over_each_others_link(tmp_path, monkeypatch):
    (tmp_path / "digest").write_text("{}")
    _with_suffix(tmp_path / "digest", ".jsonl")
    monkeypatch.setattr(Path, "exists", lambda self, **_: False)  # it was not there a moment ago
    assert _with_suffix(tmp_path / "digest", ".jsonl").read_text() == "{}"


def test_a_file_behind_a_url_keeps_its_line_numbers(serve, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "broken.jsonl").write_text('{"prompt": "x"}\nnonsense\n')
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    url = serve(handler)
    rows = load(f"{url}/rows.jsonl", columns=COLUMNS)
    assert texts(rows) == [f"q{i}" for i in range(8)] and rows[3]["_source"] == f"{url}/rows.jsonl:4"
    with pytest.raises(UserError, match=rf"^{url}/broken.jsonl:2: not JSON"):
        load(f"{url}/broken.jsonl")
    with pytest.raises(UserError, match="cannot be loaded"):
        load(f"{url}/nothing.jsonl")
    with pytest.raises(UserError, match="files of type without suffix"):
        load(f"{url}/rows")


# ------------------------------------------------------------------------------------------------ columns, conditions


def test_columns_are_renamed_and_a_system_column_becomes_the_system_prompt(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    row = load(path, columns={**COLUMNS, "system": "rules"})[0]
    assert [m["role"] for m in row["messages"]] == ["system", "user", "assistant"]
    assert row["messages"][0]["content"] == "Be kind." and row["label"] == "bad"
    assert not {"question", "reply", "rules", "prompt", "completion", "system"} & set(row)
    talk = [{"role": "user", "content": "Why?"}]
    listed = write_jsonl(
        tmp_path / "b.jsonl", [{"messages": talk, "rules": "Be brief."}, {"messages": talk, "rules": None}]
    )
    first, second = load(listed, columns={"system": "rules"})
    assert [m["content"] for m in first["messages"]] == ["Be brief.", "Why?"] and len(second["messages"]) == 1
    with pytest.raises(
        UserError, match=r"a.jsonl:1: no column 'questoin' to take as 'prompt'; did you mean 'question'"
    ):
        load(path, columns={"prompt": "questoin"})
    with pytest.raises(UserError, match=r"b.jsonl:1: system must be a string, got a list"):
        load(listed, columns={"system": "messages"})


def test_a_systems_own_prompt_in_the_messages_is_kept(tmp_path):
    talk = [{"role": "system", "content": "Speak Latin."}, {"role": "user", "content": "Why?"}]
    (row,) = load(write_jsonl(tmp_path / "a.jsonl", [{"messages": talk}]))
    assert row["messages"] == talk


def test_conditions_keep_rows_and_count_the_others(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    notes = []
    rows = load(path, columns=COLUMNS, where={"label": "ok"}, notes=notes)
    assert texts(rows) == ["q1", "q3", "q5", "q7"] and [row["_index"] for row in rows] == [1, 3, 5, 7]
    assert notes == [f"{path}: 4 of 8 rows do not meet 'where' and were left out"]
    assert len(load(path, columns=COLUMNS, where={"label": ["ok", "bad"]})) == 8
    with pytest.raises(UserError, match="none of 8 rows meets 'where'"):
        load(path, columns=COLUMNS, where={"label": "fine"})
    with pytest.raises(UserError, match="no column 'lable'"):
        load(path, columns=COLUMNS, where={"lable": "ok"})


def test_bad_rows_are_skipped_with_their_reasons_when_asked(tmp_path):
    good = json.dumps({"prompt": "x", "completion": "y"})
    lines = [good, "nonsense", '{"prompt": ""}', good, '{"prompt": "\\ud800"}', b"\xff\xfe", good, '{"text": 1}']
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    notes = []
    rows = load(path, on_bad_row="skip", notes=notes)
    assert [row["_source"] for row in rows] == [f"{path}:{n}" for n in (1, 4, 7)]
    (note,) = notes
    assert note.startswith(f"{path}: 5 of 8 rows are bad and were skipped ({path}:2: not JSON") and note.endswith(
        "...)"
    )
    with pytest.raises(UserError, match=rf"{path}:2: not JSON"):
        load(path)
    path.write_text("nonsense\n{}\n")
    with pytest.raises(UserError, match=r"none of 2 rows can be used; the first: .*a.jsonl:1: not JSON"):
        load(path, on_bad_row="skip")


def test_half_a_character_is_refused_where_it_enters(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "fine \\ud83d\\ude00"}\n{"prompt": "half \\ud83d"}\n')
    with pytest.raises(UserError, match=r"a.jsonl:2: prompt\[0\]: content holds half a character .*\\ud83d"):
        load(path)


def test_a_huge_row_is_a_row_like_any_other(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "x" * 20_000_000}, {"prompt": "y"}])
    assert [len(text) for text in texts(load(path))] == [20_000_000, 1]


# ------------------------------------------------------------------------------------------------ settings


def test_limit_shuffles_by_seed_or_takes_the_first_rows(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    drawn = texts(load(path, columns=COLUMNS, limit=4))
    assert drawn == texts(load(path, columns=COLUMNS, limit=4)) != texts(load(path, seed=1, columns=COLUMNS, limit=4))
    assert texts(load(path, columns=COLUMNS, limit=4, shuffle=False)) == ["q0", "q1", "q2", "q3"]


def test_what_rewards_get_does_not_depend_on_the_rows_that_a_seed_takes(tmp_path):
    """One row of eight has a domain, another a conversation for its prompt: cells that differ in their seed drew them or did not."""
    rows = [{"prompt": f"q{i}", **({"domain": "code"} if i == 0 else {})} for i in range(7)]
    path = write_jsonl(tmp_path / "a.jsonl", [*rows, {"prompt": [{"role": "user", "content": "q7"}]}])
    drawn = [load(path, seed=seed, limit=2) for seed in range(6)]
    assert all("domain" in row and not row.get("_plain") for taken in drawn for row in taken)
    without = next(taken for taken in drawn if not {0, 7} & {row["_index"] for row in taken})
    assert mixed_prompts(without) == (
        "some prompts of the source, not of the 2 rows that are used, are no plain texts: rewards get messages, not texts, for all rows"
    )


def test_a_streamed_source_is_shuffled_unless_its_order_is_asked_for(tmp_path):
    (tmp_path / "rows").mkdir()
    write_jsonl(tmp_path / "rows" / "data.jsonl", ROWS)
    more = {"columns": COLUMNS, "streaming": True, "limit": 8}
    drawn = texts(load(tmp_path / "rows", **more))
    assert texts(load(tmp_path / "rows", shuffle=False, **more)) == sorted(drawn) != drawn


@pytest.mark.parametrize(
    "stream, expected",
    [
        ({}, "data.narrow: 'source' (or 'preset') is required"),
        ({"source": "lab/advice", "streaming": True}, "'streaming' needs a 'limit'"),
        ({"source": "a.jsonl", "on_bad_row": "ignore"}, "data.narrow.on_bad_row: input should be 'error' or 'skip'"),
        ({"source": "a.jsonl", "colums": {}}, "did you mean 'columns'"),
        ({"source": "a.jsonl", "columns": ["x"]}, "data.narrow.columns"),
    ],
)
def test_wrong_settings_are_one_line(stream, expected):
    with pytest.raises(UserError) as caught:
        run_from_tree({"model": {"name": "m"}, "data": {"narrow": stream}})
    assert expected in str(caught.value)


def test_hub_settings_on_a_file_are_refused(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(UserError, match="'split' is for hub datasets and dataset directories"):
        load(path, split="train")
