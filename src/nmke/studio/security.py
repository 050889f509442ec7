"""Who may talk to the studio: the right Host, the right Origin, the token, and no larger a body than agreed.

Source: OWASP, Cross-Site Request Forgery Prevention; DNS rebinding is met by the Host check: a page whose own name
was made to point at this machine still sends that name.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.exceptions import HTTPException

from nmke.errors import ConfigError
from nmke.studio.limits import Limits, StudioError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK = ("127.0.0.1", "localhost", "::1")
WILDCARD = ("0.0.0.0", "::")
SHORTEST_TOKEN = 16
UPLOADS = ("/v1/imports", "/gradio_api/upload")
HEADERS = {
    # Everything comes from here; Gradio's page needs inline scripts and styles, and templates that it compiles.
    "content-security-policy": (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
        "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


@dataclass(frozen=True)
class Access:
    """Where the studio listens and who may come in.

    Args:
        host: Address it is bound to.
        port: TCP port.
        token: What every request must know; required unless the host is this machine's own.

    Raises:
        ConfigError: If the token is missing or too short.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.token is None and self.host not in LOOPBACK:
            raise ConfigError(
                f"host {self.host!r} lets other machines in and no token was given; add --token with at least "
                f"{SHORTEST_TOKEN} characters, or leave out --host"
            )
        if self.token is not None and (len(self.token) < SHORTEST_TOKEN or not self.token.isascii()):
            raise ConfigError(
                f"the token has {len(self.token)} characters; give {SHORTEST_TOKEN} or more, in ASCII"
            )

    @property
    def url(self) -> str:
        """Where a browser on this machine finds it, token included."""
        name = "127.0.0.1" if self.host in WILDCARD else self.host
        name = f"[{name}]" if ":" in name else name
        query = "" if self.token is None else "/?" + urlencode({"token": self.token})
        return f"http://{name}:{self.port}{query}"

    @property
    def cookie(self) -> tuple[str, str]:
        """Name and value of the cookie that stands for the token; not the token itself."""
        digest = hashlib.sha256(f"nmke-studio:{self.token}".encode()).hexdigest()
        return f"nmke_studio_{self.port}", digest

    def knows(self, host: str) -> bool:
        """Whether a Host header may be answered."""
        try:
            parts = urlsplit(f"//{host}")
            name, port = parts.hostname or "", parts.port or 80
        except ValueError:
            return False
        if self.host in WILDCARD:  # any name may lead here; the token is what counts
            return bool(name)
        names = LOOPBACK if self.host in LOOPBACK else (self.host.lower(),)
        return name in names and port == self.port


class Guard:
    """ASGI middleware in front of everything, Gradio's own routes included.

    Args:
        app: What it guards.
        access: Who may come in.
        limits: How large a body may be.
    """

    def __init__(self, app: App, access: Access, limits: Limits) -> None:
        self._app, self._access, self._limits = app, access, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]
        }
        try:
            self._check_source(scope, headers)
            login = self._login(scope)
            if login is not None:
                await _answer(send, 303, {"location": login[0], "set-cookie": login[1]}, b"")
                return
            self._check_token(headers)
            limit = self._body_limit(scope["path"])
            _check_length(headers.get("content-length"), limit)
        except StudioError as error:
            await _refuse(scope, headers, receive, send, error)
            return
        await self._app(scope, _limited(receive, limit), _with_headers(send))

    def _check_source(self, scope: Scope, headers: dict[str, str]) -> None:
        host = headers.get("host", "")
        if not self._access.knows(host):
            raise StudioError(
                403,
                "wrong_host",
                f"host {host[:80]!r} is not the studio's; open {self._access.host}:{self._access.port}",
            )
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            raise StudioError(
                403, "wrong_origin", f"a page of {origin[:80]!r} asked; only the studio's own pages may"
            )
        site, mode = headers.get("sec-fetch-site", "none"), headers.get("sec-fetch-mode", "")
        visit = mode == "navigate" and scope.get("method") == "GET"
        if site in ("cross-site", "same-site") and not visit:
            raise StudioError(
                403, "wrong_origin", f"a page of another site asked ({site}); only the studio's own pages may"
            )

    def _login(self, scope: Scope) -> tuple[str, str] | None:
        """Where a visit with `?token=` goes on, and its cookie: the token does not stay in the address."""
        token = self._access.token
        if token is None or scope["type"] != "http" or scope["method"] != "GET":
            return None
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        given = dict(query).get("token")
        if given is None or not _same(given, token):
            return None
        left = urlencode([(name, value) for name, value in query if name != "token"])
        name, value = self._access.cookie
        place = "/" + scope["path"].lstrip("/\\") + (f"?{left}" if left else "")
        return place, f"{name}={value}; HttpOnly; SameSite=Strict; Path=/"

    def _check_token(self, headers: dict[str, str]) -> None:
        if self._access.token is None:
            return
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and _same(given.strip(), self._access.token):
            return
        name, value = self._access.cookie
        try:
            cookies = SimpleCookie(headers.get("cookie", ""))
        except CookieError:
            cookies = SimpleCookie()
        if name in cookies and _same(cookies[name].value, value):
            return
        raise StudioError(
            401,
            "no_token",
            "no token came with the request; open the address that `nmke studio` printed, or send "
            "'Authorization: Bearer TOKEN'",
        )

    def _body_limit(self, path: str) -> int:
        upload = any(path == start or path.startswith(f"{start}/") for start in UPLOADS)
        return self._limits.upload_bytes if upload else self._limits.body_bytes


def too_large(limit: int) -> StudioError:
    """The error for a body over the limit."""
    return StudioError(
        413, "body_too_large", f"the body has more than {limit:,} bytes, the most that is read; send less"
    )


def _check_length(length: str | None, limit: int) -> None:
    if length is not None and length.isdecimal() and int(length) > limit:
        raise too_large(limit)


def _same(given: str, expected: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "replace"), expected.encode())


def _limited(receive: Receive, limit: int) -> Receive:
    """Counts what comes in: a length header may be missing or wrong."""
    seen = 0

    async def counted() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > limit:
            raise HTTPException(413, str(too_large(limit)))  # the one kind that FastAPI lets through as it is
        return message

    return counted


def _with_headers(send: Send) -> Send:
    async def complete(message: Message) -> None:
        if message["type"] == "http.response.start":
            own = {name.lower() for name, _ in message.get("headers", [])}
            more = [(k.encode(), v.encode()) for k, v in HEADERS.items() if k.encode() not in own]
            message["headers"] = [*message.get("headers", []), *more]
        await send(message)

    return complete


async def _refuse(
    scope: Scope, headers: dict[str, str], receive: Receive, send: Send, error: StudioError
) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1008, "reason": error.code})
        return
    if "text/html" in headers.get("accept", ""):
        text = f"{error.code.replace('_', ' ')}: {error}"
        await _answer(send, error.status, {"content-type": "text/plain; charset=utf-8"}, text.encode())
        return
    content = {"error": {"code": error.code, "message": str(error)}}
    more = {"www-authenticate": "Bearer"} if error.status == 401 else {}
    await _answer(
        send, error.status, {"content-type": "application/json", **more}, json.dumps(content).encode()
    )


async def _answer(send: Send, status: int, headers: dict[str, str], body: bytes) -> None:
    everything = {**headers, **HEADERS, "content-length": str(len(body)), "cache-control": "no-store"}
    raw = [(name.encode(), value.encode("latin-1")) for name, value in everything.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
