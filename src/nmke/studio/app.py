"""The application: API, its documentation page, the studio's pages, and the guard in front of them."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any

import jinja2
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException

import nmke
from nmke.errors import NmkeError
from nmke.studio.api import router, say_problem
from nmke.studio.security import Access, Guard
from nmke.studio.service import Studio

DESCRIPTION = (
    "Edit facts of an open language model: writes are jobs in a queue with one writer, reads answer at once, "
    "answers of the model wait for their turn between two batches."
)


def make_app(studio: Studio, access: Access, *, pages: bool = True) -> FastAPI:
    """The application of one open run.

    Args:
        studio: The run; whoever opened it closes it.
        access: Who may come in.
        pages: Serve the studio's pages too, not only the API.
    """
    app = FastAPI(
        title="nmke studio",
        version=nmke.__version__,
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
    )
    app.state.studio = studio
    app.include_router(router)
    app.add_api_route("/docs", _docs, include_in_schema=False, response_class=HTMLResponse)
    app.add_exception_handler(NmkeError, say_problem)
    app.add_exception_handler(RequestValidationError, _say_invalid)
    app.add_exception_handler(HTTPException, _say_http)
    app.add_middleware(Guard, access=access, limits=studio.limits)
    if pages:
        from nmke.studio.pages.blocks import mount

        mount(app, studio, access)
    return app


async def _docs(request: Request) -> HTMLResponse:
    return HTMLResponse(docs_page(request.app.openapi()))


def docs_page(schema: dict[str, Any]) -> str:
    """The OpenAPI schema as one page that loads nothing."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            entry = {
                **operation,
                "method": method.upper(),
                "path": path,
                "fields": _fields(schema, operation),
            }
            groups.setdefault(operation["tags"][0], []).append(entry)
    return templates().get_template("docs.html").render(info=schema["info"], groups=groups)


def _fields(schema: dict[str, Any], operation: dict[str, Any]) -> list[dict[str, Any]]:
    """Parameters and the body's fields, one line each."""
    found = [
        {**given, "where": given["in"], "type": _type(given["schema"])}
        for given in operation.get("parameters", ())
    ]
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    model = schema["components"]["schemas"].get(body.get("$ref", "").rpartition("/")[2], {})
    required = model.get("required", ())
    for name, field in model.get("properties", {}).items():
        text = field.get("description", "")
        found.append(
            {
                "name": name,
                "where": "body",
                "type": _type(field),
                "required": name in required,
                "description": text,
            }
        )
    return found


def _type(field: dict[str, Any]) -> str:
    """What a field holds, in words."""
    if "$ref" in field:
        return str(field["$ref"]).rpartition("/")[2]
    if "enum" in field:
        return " or ".join(map(repr, field["enum"]))
    for word in ("anyOf", "oneOf"):
        if word in field:
            return " or ".join(_type(part) for part in field[word])
    if field.get("type") == "array":
        return f"list of {_type(field.get('items', {}))}"
    return str(field.get("type", "anything"))


@cache
def templates() -> jinja2.Environment:
    """The HTML templates; every value is escaped."""
    folder = resources.files("nmke.studio") / "templates"
    loader = jinja2.FunctionLoader(lambda name: (folder / name).read_text(encoding="utf-8"))
    return jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )


async def _say_invalid(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    details = [
        {"field": ".".join(map(str, item["loc"])), "message": str(item["msg"])} for item in error.errors()
    ]
    first = f"{details[0]['field']}: {details[0]['message']}" if details else "the body cannot be read"
    message = f"the request does not fit the schema ({first}); /docs shows what it takes"
    return JSONResponse({"error": {"code": "invalid_request", "message": message, "details": details}}, 422)


async def _say_http(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "wrong_method", 413: "body_too_large"}.get(error.status_code, "refused")
    message = str(error.detail) if error.status_code == 413 else f"{error.detail}; /docs lists what there is"
    content = {"error": {"code": code, "message": message, "details": []}}
    return JSONResponse(content, error.status_code, headers=error.headers)
