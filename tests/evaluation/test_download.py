"""Downloads from a server on loopback: whole, resumed, changed on the way, from archives, with labels."""

import hashlib
import io
import json
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from nmke.errors import RequestError, VerifyError
from nmke.evaluation.ability import ability_tasks
from nmke.evaluation.benchmarks import benchmarks
from nmke.evaluation.data_sets import DataFile, data_sets, source_of
from nmke.evaluation.download import RECORD, fetch, read_record

CONTENT = b"".join(b'{"line": %d}\n' % number for number in range(20_000))


@dataclass
class Server:
    """What it serves, whether it can resume, where it breaks off, and what it was asked."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    ranges: bool = True
    breaks_after: int | None = None
    asked: list[str | None] = field(default_factory=list)


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            state.asked.append(wanted)
            content = state.files.get(self.path)
            if content is None:
                self.send_error(404)
                return
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and state.ranges else 0
            if start and start >= len(content):
                self.send_error(416)
                return
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.wfile.write(content[start:][: state.breaks_after])

        def log_message(self, *_: object) -> None:
            """Quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        state.url = f"http://127.0.0.1:{http.server_port}"
        state.files["/data.jsonl"] = CONTENT
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield state
        http.shutdown()
        thread.join()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_fetches_records_the_hash_and_fetches_once(server: Server, tmp_path: Path) -> None:
    file = DataFile(f"{server.url}/data.jsonl", "data.jsonl")
    first = fetch(file, tmp_path / "new")
    assert first.path.read_bytes() == CONTENT
    assert (first.sha256, first.pinned, first.fresh) == (sha256(CONTENT), False, True)
    assert read_record(tmp_path / "new") == {"data.jsonl": {"url": file.url, "sha256": sha256(CONTENT)}}
    again = fetch(file, tmp_path / "new")
    assert (again.fresh, again.sha256, len(server.asked)) == (False, sha256(CONTENT), 1)
    assert fetch(file, tmp_path / "new", force=True).pinned
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["data.jsonl", RECORD]


def test_goes_on_where_it_broke_off(server: Server, tmp_path: Path) -> None:
    file = DataFile(f"{server.url}/data.jsonl", "data.jsonl", sha256=sha256(CONTENT))
    server.breaks_after = 100_000
    with pytest.raises(RequestError, match="run the command again, it goes on from there"):
        fetch(file, tmp_path)
    assert not (tmp_path / "data.jsonl").exists()
    assert (tmp_path / "data.jsonl.part").stat().st_size == 100_000
    server.breaks_after = None
    found = fetch(file, tmp_path)
    assert server.asked == [None, "bytes=100000-"]
    assert found.path.read_bytes() == CONTENT and found.pinned


def test_begins_anew_where_the_server_cannot_resume(server: Server, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl.part").write_bytes(b"something else" * 100)
    server.ranges = False
    assert fetch(DataFile(f"{server.url}/data.jsonl", "data.jsonl"), tmp_path).sha256 == sha256(CONTENT)


def test_a_part_that_is_whole_already_is_fetched_again(server: Server, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl.part").write_bytes(CONTENT)
    assert fetch(DataFile(f"{server.url}/data.jsonl", "data.jsonl"), tmp_path).sha256 == sha256(CONTENT)
    assert server.asked == [f"bytes={len(CONTENT)}-", None]


def test_other_bytes_than_pinned_or_recorded_are_refused(server: Server, tmp_path: Path) -> None:
    pinned = DataFile(f"{server.url}/data.jsonl", "data.jsonl", sha256="0" * 64)
    with pytest.raises(VerifyError, match=r"has sha256 [0-9a-f]{12}, expected 000000000000"):
        fetch(pinned, tmp_path)
    assert list(tmp_path.iterdir()) == []
    file = DataFile(f"{server.url}/data.jsonl", "data.jsonl")
    fetch(file, tmp_path)
    server.files["/data.jsonl"] = b"changed"
    with pytest.raises(VerifyError, match=r"remove 'data\.jsonl' from .*downloads\.json' to accept it"):
        fetch(file, tmp_path, force=True)
    assert (tmp_path / "data.jsonl").read_bytes() == CONTENT


def test_takes_the_file_out_of_an_archive(server: Server, tmp_path: Path) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("deep/dev.jsonl", CONTENT)
    server.files["/set.zip"] = packed.getvalue()
    found = fetch(DataFile(f"{server.url}/set.zip", "dev.jsonl", member="deep/dev.jsonl"), tmp_path)
    assert found.path.read_bytes() == CONTENT and found.sha256 == sha256(packed.getvalue())
    with pytest.raises(RequestError, match="holds no 'other'"):
        fetch(DataFile(f"{server.url}/set.zip", "other.jsonl", member="other"), tmp_path)


def test_puts_labels_into_the_records(server: Server, tmp_path: Path) -> None:
    server.files |= {"/v.jsonl": b'{"goal": "a"}\n{"goal": "b"}\n', "/v.lst": b"1\n0\n"}
    file = DataFile(f"{server.url}/v.jsonl", "v.jsonl", labels=f"{server.url}/v.lst")
    lines = fetch(file, tmp_path).path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"goal": "a", "label": "1"}, {"goal": "b", "label": "0"}]
    server.files["/v.lst"] = b"1\n"
    with pytest.raises(RequestError, match=r"has 2 records, .* has 1 labels"):
        fetch(file, tmp_path, force=True)


@pytest.mark.parametrize(
    ("path", "message"), [("/none", "answers 404 Not Found.*NMKE_DATA"), (None, "is no http address")]
)
def test_bad_addresses_are_one_error(server: Server, tmp_path: Path, path: str | None, message: str) -> None:
    url = f"{server.url}{path}" if path else "file:///etc/hosts"
    with pytest.raises(RequestError, match=message):
        fetch(DataFile(url, "x"), tmp_path)


def test_unreachable_server_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot be reached"):
        fetch(DataFile("http://127.0.0.1:9/x", "x"), tmp_path)


def test_every_data_set_is_what_a_benchmark_or_task_reads() -> None:
    """Each fetched file has a name that its reader looks for."""
    for entry in data_sets:
        names = {file.name for file in entry.value.files}
        assert all(file.url.startswith("https://") for file in entry.value.files)
        if entry.name in benchmarks:
            assert names & set(benchmarks.get(entry.name).files)
        elif entry.name in ability_tasks:
            task = ability_tasks.get(entry.name)
            assert names == set(task.files[1:]) | set(task.shot_files[1:])
        else:
            assert entry.name in ("wikitext", "multi-counterfact")
    assert {name for name in ability_tasks.names() if source_of(name) is None} == {
        "mmlu",
        "bbh",
        "social_iqa",
    }
    assert {name for name in benchmarks.names() if source_of(name) is None} == set()
