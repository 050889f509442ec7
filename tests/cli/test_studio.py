import socket

import pytest
import uvicorn


@pytest.fixture
def served(monkeypatch):
    """What would be served, and with which options, instead of serving for ever."""
    found = {}
    monkeypatch.setattr(uvicorn, "run", lambda app, **options: found.update(app=app, **options))
    monkeypatch.setattr("nmke.studio.app.make_app", lambda studio, access: (studio, access))
    return found


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_the_studio_opens_on_this_machine_only(nmke, source, corpus, served, tmp_path):
    port = free_port()
    done = nmke("studio", source, "-o", tmp_path / "run", "--port", port, "--corpus", corpus)
    assert done.code == 0, done.err
    assert (served["host"], served["port"]) == ("127.0.0.1", port)
    assert f"http://127.0.0.1:{port}" in done.out


def test_a_run_is_gone_on_with_and_its_lock_is_free_again(nmke, source, served, tmp_path):
    for _ in range(2):
        assert nmke("studio", source, "-o", tmp_path / "run", "--port", free_port()).code == 0
    assert nmke("studio", tmp_path / "run", "--port", free_port()).code == 0
    assert nmke("log", tmp_path / "run").code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--host", "0.0.0.0"], 2, "no token was given"),
        (["--token", "short"], 2, "has 5 characters"),
        (["--port", "0"], 2, "--port"),
        (["--resume"], 2, "--resume"),
    ],
)
def test_unsafe_or_unknown_options_are_refused_before_loading(nmke, source, arguments, code, message):
    done = nmke("studio", source, *arguments)
    assert done.code == code and message in done.err


def test_a_port_in_use_is_named(nmke, source):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = nmke("studio", source, "--port", port)
    assert done.code == 2 and f"127.0.0.1:{port} cannot be listened on" in done.err


def test_missing_packages_name_the_command_that_installs_them(nmke, source, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = nmke("studio", source)
    assert done.code == 3 and "pip install 'nmke[studio]'" in done.err
