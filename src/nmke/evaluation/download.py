"""Fetch a data set from its canonical address: resumed after a break, checked by sha256, whole or not at all."""

from __future__ import annotations

import hashlib
import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nmke
from nmke.errors import RequestError, VerifyError
from nmke.evaluation.data_sets import DataFile
from nmke.models.cache import atomic_file
from nmke.progress import Progress, quiet

RECORD = "downloads.json"
SCHEMA = "nmke.downloads/1"
BLOCK = 1 << 16
TIMEOUT_SECONDS = 30.0


@dataclass(frozen=True)
class Fetched:
    """A file that is there now.

    Args:
        path: Where.
        sha256: Of the bytes that were published; of an archive, of the archive.
        pinned: Whether that hash was known beforehand, by us or from an earlier download.
        fresh: Whether it was fetched now.
    """

    path: Path
    sha256: str
    pinned: bool
    fresh: bool


def fetch(file: DataFile, folder: Path, *, force: bool = False, progress: Progress = quiet) -> Fetched:
    """Have the file in the folder.

    What an interrupted download left (`NAME.part`) is gone on with where the server can send the rest. The
    published bytes are hashed; the hash must be the pinned one, or the one recorded at the first download.

    Args:
        file: What to fetch.
        folder: Where to; it is made.
        force: Fetch again although it is there.
        progress: Told about the bytes.

    Raises:
        RequestError: If the address cannot be read, or the archive lacks the file.
        VerifyError: If the bytes have another hash than they should; nothing is kept then.
    """
    path = folder / file.name
    recorded = read_record(folder).get(file.name, {})
    expected = file.sha256 or recorded.get("sha256")
    if path.is_file() and not force and recorded:
        return Fetched(path, recorded["sha256"], file.sha256 is not None, fresh=False)
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{file.name}.part"
    found = _download(file.url, part, progress)
    if expected is not None and found != expected:
        part.unlink()
        raise VerifyError(
            f"{file.url} has sha256 {found[:12]}, expected {expected[:12]}; it was changed or damaged on the way: "
            f"try again, or remove {file.name!r} from {str(folder / RECORD)!r} to accept it"
        )
    labels = _read_labels(file.labels) if file.labels else None
    with atomic_file(path) as temporary:
        _unpack(part, file, labels, temporary)
    part.unlink()
    _remember(folder, file, found)
    return Fetched(path, found, expected is not None, fresh=True)


def read_record(folder: Path) -> dict[str, dict[str, Any]]:
    """What was downloaded into the folder, by file name: url and sha256 of the published bytes."""
    try:
        content = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return dict(content["files"]) if content["schema"] == SCHEMA else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _remember(folder: Path, file: DataFile, sha256: str) -> None:
    files = read_record(folder) | {file.name: {"url": file.url, "sha256": sha256}}
    with atomic_file(folder / RECORD) as temporary:
        temporary.write_text(json.dumps({"schema": SCHEMA, "files": files}, indent=1), encoding="utf-8")


def _download(url: str, part: Path, progress: Progress) -> str:
    """Fill `part` with what the address holds; sha256 of it."""
    digest, have = hashlib.sha256(), 0
    if part.is_file():
        with part.open("rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
                have += len(block)
    with _opened(url, have) as answer:
        if have and answer.status != http.client.PARTIAL_CONTENT:  # the server begins anew
            digest, have = hashlib.sha256(), 0
        total = have + int(answer.headers.get("Content-Length") or 0)
        title = f"fetching {part.name.removesuffix('.part')} (kB)"
        with part.open("ab" if have else "wb") as file, progress.task(title, total=total // 1000) as task:
            task.advance(have // 1000)
            while block := _block(answer, url):
                file.write(block)
                digest.update(block)
                task.advance(len(block) / 1000)
                have += len(block)
    if total and have < total:
        raise RequestError(
            f"{url} ended after {have:,} of {total:,} bytes; run the command again, it goes on from there"
        )
    return digest.hexdigest()


def _block(answer: Any, url: str) -> bytes:
    try:
        return bytes(answer.read(BLOCK))
    except (OSError, http.client.HTTPException) as error:
        raise RequestError(
            f"{url} broke off ({error}); run the command again, it goes on from there"
        ) from error


@contextmanager
def _opened(url: str, start: int) -> Iterator[Any]:
    """The answer to a request for the address from byte `start` on."""
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise RequestError(f"{url!r} is no http address; check the data set's entry")
    headers = {"User-Agent": f"nmke/{nmke.__version__}"}
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        answer = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if start and error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            with _opened(url, 0) as whole:
                yield whole
            return
        raise RequestError(
            f"{url} answers {error.code} {error.reason}; the publisher may have moved it: fetch the file by hand "
            "into a folder and name that in NMKE_DATA"
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise RequestError(
            f"{url} cannot be reached ({error}); check the network and run it again"
        ) from error
    with answer:
        yield answer


def _read_labels(url: str) -> list[str]:
    with _opened(url, 0) as answer:
        return [line.strip() for line in answer.read().decode("utf-8").splitlines() if line.strip()]


def _unpack(part: Path, file: DataFile, labels: list[str] | None, target: Path) -> None:
    """Write the data file from what was downloaded."""
    content = part.read_bytes() if file.member is None else _member(part, file)
    if labels is None:
        target.write_bytes(content)
        return
    lines = [line for line in content.decode("utf-8").splitlines() if line.strip()]
    if len(lines) != len(labels):
        raise RequestError(
            f"{file.url} has {len(lines)} records, {file.labels} has {len(labels)} labels; try again"
        )
    records = ({**json.loads(line), "label": label} for line, label in zip(lines, labels, strict=True))
    target.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")


def _member(part: Path, file: DataFile) -> bytes:
    try:
        with zipfile.ZipFile(part) as archive:
            return archive.read(str(file.member))
    except (zipfile.BadZipFile, KeyError) as error:
        part.unlink()
        raise RequestError(
            f"{file.url} holds no {file.member!r} ({error}); the publisher may have changed the archive"
        ) from error
