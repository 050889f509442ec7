import asyncio
import re

import pytest
from fastapi.testclient import TestClient
from tests.studio.conftest import HOST, client_of

from nmke.errors import ConfigError
from nmke.studio.app import make_app
from nmke.studio.security import Access

TOKEN = "0123456789abcdef"


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:7860", "127.0.0.1:80", "127.0.0.1.evil.example:7860", "", "[::1"]
)
def test_other_hosts_are_refused_so_that_rebound_names_get_nothing(client, host):
    found = client.get("/v1/health", headers={"host": host})
    assert found.status_code == 403 and found.json()["error"]["code"] == "wrong_host"


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost:7860", "[::1]:7860", "LOCALHOST:7860"])
def test_the_machines_own_names_are_answered(client, host):
    assert client.get("/v1/health", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:9999"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_pages_of_other_origins_are_refused(client, headers):
    for method in ("GET", "POST"):
        found = client.request(method, "/v1/edits", headers=headers)
        assert found.status_code == 403 and found.json()["error"]["code"] == "wrong_origin"


def test_the_studios_own_pages_and_links_to_it_are_let_in(client):
    assert (
        client.get("/v1/health", headers={"origin": HOST, "sec-fetch-site": "same-origin"}).status_code == 200
    )
    visit = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert client.get("/docs", headers=visit).status_code == 200
    assert client.post("/v1/undo", json={}, headers=visit).status_code == 403


def test_a_token_is_asked_of_everything(studio):
    with client_of(studio, Access(token=TOKEN)) as client:
        for path in ("/v1/health", "/docs", "/openapi.json", "/", "/v1/none"):
            found = client.get(path)
            assert (found.status_code, found.json()["error"]["code"]) == (401, "no_token"), path
        assert client.get("/v1/health", headers={"authorization": "Bearer wrong"}).status_code == 401
        assert client.get("/v1/health", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200


def test_the_printed_address_trades_the_token_for_a_cookie_once(studio):
    with client_of(studio, Access(token=TOKEN)) as client:
        assert client.get("/docs", params={"token": "wrong"}).status_code == 401
        first = client.get("/docs", params={"token": TOKEN, "a": "b"}, follow_redirects=False)
        assert (first.status_code, first.headers["location"]) == (303, "/docs?a=b")
        cookie = first.headers["set-cookie"]
        assert "HttpOnly" in cookie and "SameSite=Strict" in cookie and TOKEN not in cookie
        assert client.get("/docs").status_code == 200
        aside = client.get("//evil.example/", params={"token": TOKEN}, follow_redirects=False)
        assert not aside.headers.get("location", "").startswith("//")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"host": "0.0.0.0"}, "lets other machines in and no token was given"),
        ({"host": "192.168.0.5"}, "lets other machines in"),
        ({"token": "short"}, "has 5 characters; give 16"),
    ],
)
def test_open_addresses_need_a_long_token(given, message):
    with pytest.raises(ConfigError, match=message):
        Access(**given)


def test_any_name_may_lead_to_a_studio_on_all_addresses_but_only_with_its_token(studio):
    with client_of(studio, Access("0.0.0.0", token=TOKEN)) as client:
        headers = {"host": "box.lan:7860"}
        assert client.get("/v1/health", headers=headers).status_code == 401
        assert (
            client.get("/v1/health", headers={**headers, "authorization": f"Bearer {TOKEN}"}).status_code
            == 200
        )
    assert Access("192.168.0.5", token=TOKEN).knows("192.168.0.5:7860")
    assert not Access("192.168.0.5", token=TOKEN).knows("box.lan:7860")


def test_every_answer_forbids_other_hosts_frames_and_guessing(client):
    for path in ("/v1/health", "/docs", "/v1/none"):
        headers = client.get(path).headers
        assert "default-src 'self'" in headers["content-security-policy"]
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert not re.search(r"https?:", headers["content-security-policy"])
        assert headers["x-content-type-options"] == "nosniff"


def test_refusals_to_browsers_are_plain_text(client):
    found = client.get("/", headers={"host": "<script>alert(1)</script>", "accept": "text/html"})
    assert found.status_code == 403 and found.headers["content-type"].startswith("text/plain")


def test_tokens_are_not_shown_in_reprs():
    assert TOKEN not in repr(Access(token=TOKEN)) and TOKEN in Access(token=TOKEN).url


@pytest.fixture(scope="module")
def page_client(tmp_path_factory, store):
    """The whole application, pages included; Gradio is slow to build, so one serves every test."""
    from tests import runs

    from nmke.studio.service import Studio

    root = tmp_path_factory.mktemp("pages") / "run"
    studio = Studio(runs.open_run(root, store=store, steps=15))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", "")
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "")
        with TestClient(asyncio.run(build(studio)), base_url=HOST) as client:
            yield client
    studio.close()


async def build(studio):
    """Inside a running loop: Gradio makes one of its own otherwise, several times, and leaves it open."""
    return make_app(studio, Access())


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=../../../../etc/passwd",
        "/gradio_api/file=nmke.json",
        "/gradio_api/file=pyproject.toml",
        "/gradio_api/file=https://example.com/x",
        "/gradio_api/proxy=https://example.com/x",
        "/gradio_api/file=ledger.sqlite",
    ],
)
def test_no_path_of_a_request_reaches_the_file_system(page_client, path):
    assert page_client.get(path, follow_redirects=False).status_code in (400, 403, 404)


def test_files_of_the_run_are_not_served(page_client):
    root = page_client.app.state.studio.root
    for name in ("nmke.json", "ledger.sqlite"):
        assert page_client.get(f"/gradio_api/file={root / name}").status_code in (403, 404)


def test_uploads_keep_to_the_run_folder_and_to_their_limit(page_client):
    studio = page_client.app.state.studio
    sent = page_client.post("/gradio_api/upload", files={"files": ("../../../evil.txt", b"x")})
    assert sent.status_code == 200
    assert all(path.startswith(str(studio.root)) for path in sent.json())
    big = page_client.post("/gradio_api/upload", content=b"x", headers={"content-length": str(10**9)})
    assert big.status_code == 413 and big.json()["error"]["code"] == "body_too_large"


def test_the_page_is_guarded_and_names_no_other_host_to_load_from(page_client):
    assert page_client.get("/", headers={"host": "evil.example"}).status_code == 403
    page = page_client.get("/")
    assert page.status_code == 200
    loaded = re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=\"(https?:)?//[^\"]+\"", page.text)
    assert loaded == []
    assert (
        "fonts.googleapis" not in page.text and "fonts.googleapis" not in page_client.get("/theme.css").text
    )
