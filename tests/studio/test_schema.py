"""Every operation of the API against requests made from its own schema, good and bad ones."""

from types import SimpleNamespace
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)
from tests import runs
from tests.studio.conftest import served

from nmke.studio.app import make_app
from nmke.studio.limits import Limits
from nmke.studio.security import Access
from nmke.studio.service import Studio

CHECKS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    unsupported_method,
)


@pytest.fixture(scope="module")
def address(tmp_path_factory, store):
    root = tmp_path_factory.mktemp("schema") / "run"
    studio = Studio(runs.open_run(root, store=store, steps=1))
    with served(lambda port: make_app(studio, Access(port=port), pages=False)) as found:
        yield found
    studio.close()


def described() -> dict[str, Any]:
    """The schema; it does not depend on a run."""
    return make_app(SimpleNamespace(limits=Limits()), Access(), pages=False).openapi()


OPERATIONS = {
    found.ok().label: found.ok() for found in schemathesis.openapi.from_dict(described()).get_all_operations()
}


def test_the_schema_describes_every_operation():
    assert len(OPERATIONS) >= 18 and "POST /v1/chat/completions" in OPERATIONS


@pytest.mark.parametrize("label", OPERATIONS)
def test_every_operation_answers_as_its_schema_says(label, address):
    @settings(
        max_examples=4,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        database=None,
    )
    @given(case=OPERATIONS[label].as_strategy())
    def check(case):
        case.call_and_validate(base_url=address, checks=CHECKS, timeout=30)

    check()
