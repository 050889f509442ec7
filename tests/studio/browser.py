"""The studio as people meet it: `nmke studio` in a process of its own, and Chromium in front of it."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from nmke.models.cache import cache_dir

QUICK = ("--steps", "8", "--batch-size", "2", "--on-collapse", "continue")
MODEL = "smollm2-135m"
START_SECONDS = 600
SETTLE = 1500  # milliseconds after a page is drawn until it answers, on a busy machine
WAIT = 600_000  # milliseconds that a job may take: the first one gathers statistics where the cache is empty


@dataclass
class Server:
    """A studio process on a run folder that can be ended and started again."""

    run: Path
    port: int
    process: subprocess.Popen[bytes] | None = None
    arguments: tuple[str, ...] = QUICK

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        source = self.run if (self.run / "nmke.json").is_file() else MODEL
        output = [] if source == self.run else ["-o", self.run]
        command = [
            sys.executable,
            "-m",
            "nmke",
            "studio",
            source,
            *output,
            "--port",
            self.port,
            *self.arguments,
        ]
        own = {**os.environ, "NMKE_CACHE": str(layered_cache(self.run.parent / "cache"))}
        with self.run.with_suffix(".log").open("ab") as log:
            self.process = subprocess.Popen([str(p) for p in command], stdout=log, stderr=log, env=own)
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            assert self.process.poll() is None, self.run.with_suffix(".log").read_text()
            time.sleep(0.2)
            try:
                answer = httpx.get(f"{self.url}/v1/health", timeout=30)
            except httpx.TransportError:
                continue
            assert answer.status_code == 200, answer.text
            return
        raise AssertionError(self.run.with_suffix(".log").read_text())

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        assert self.process is not None
        self.process.send_signal(how)
        self.process.wait(timeout=60)

    def get(self, path: str) -> dict:
        return httpx.get(self.url + path, timeout=30).json()

    def post(self, path: str, **body: object) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=30)

    def finish(self, job: str) -> dict:
        end = time.monotonic() + WAIT / 1000
        while (found := self.get(f"/v1/jobs/{job}"))["state"] in ("queued", "running"):
            assert time.monotonic() < end, found
            time.sleep(0.1)
        return found


def layered_cache(folder: Path) -> Path:
    """A cache that reads what the real one holds and keeps new statistics to itself."""
    real = cache_dir()
    (folder / "stats").mkdir(parents=True, exist_ok=True)
    for path in (*real.glob("*"), *(real / "stats").glob("*")):
        own = folder / path.relative_to(real)
        if not own.exists():
            own.symlink_to(path)
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(run: Path) -> Iterator[Server]:
    server = Server(run, free_port())
    server.start()
    try:
        yield server
    finally:
        if server.process is not None and server.process.poll() is None:
            server.stop()


@contextmanager
def chromium() -> Iterator[Browser]:
    """Debian's Chromium; skips without one, unless the tests run as CI."""
    found = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if found is None:
        message = "no chromium found: install Debian's package or name one in CHROMIUM"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    flags = ["--no-sandbox", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=flags)
        yield browser
        browser.close()


@dataclass
class Visit:
    """An open page, and everything that it asked for or complained about."""

    page: Page
    server: Server
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def tab(self, name: str) -> None:
        """Open a tab; on a narrow page some are behind a menu."""
        tab = self.page.get_by_role("tab", name=name, exact=True)
        if tab.is_visible():
            tab.click()
            return
        self.page.get_by_role("button", name="More tabs").click()
        self.page.locator(".overflow-dropdown button", has_text=name).click()

    def fill(self, name: str, text: str) -> None:
        self.page.locator(f"#{name} textarea, #{name} input").first.fill(text)

    def click(self, name: str) -> None:
        self.page.locator(f"button#{name}").click()

    def choose(self, name: str, text: str) -> None:
        """Choose from a list by typing."""
        entry = self.page.locator(f"#{name} input").first
        entry.click()
        entry.fill(text)
        self.page.get_by_role("option", name=text).first.click()

    def see(self, name: str, text: str) -> None:
        expect(self.page.locator(f"#{name}")).to_contain_text(text, timeout=WAIT)

    def write(self, sentence: str, subject: str, target: str) -> None:
        self.fill("sentence", sentence)
        self.fill("subject", subject)
        self.fill("target", target)


@contextmanager
def visit(browser: Browser, server: Server, *, width: int = 1400, dark: bool = False) -> Iterator[Visit]:
    """Open the studio's page; afterwards, that nothing was asked of another host and nothing went wrong."""
    scheme = "dark" if dark else "light"
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    context.set_default_timeout(WAIT)
    expect.set_options(timeout=WAIT)
    page = context.new_page()
    found = Visit(page, server)
    page.on("request", lambda request: found.requests.append(request.url))
    page.on("pageerror", lambda error: found.complaints.append(str(error)))
    page.on(
        "console",
        lambda said: found.complaints.append(said.text) if "Content Security Policy" in said.text else None,
    )
    page.goto(server.url)
    expect(page.get_by_role("tab", name="Edit", exact=True)).to_be_visible()
    page.wait_for_timeout(SETTLE)
    yield found
    hosts = {urlsplit(url).netloc for url in found.requests if not url.startswith(("data:", "blob:"))}
    context.close()
    assert hosts == {f"127.0.0.1:{server.port}"}
    assert found.complaints == []
