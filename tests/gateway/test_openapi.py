"""The OpenAPI page holds: whatever it allows or forbids is answered as it says."""

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance
from schemathesis.specs.openapi.schemas import (
    OpenApiSchema,
)  # now: parsed beside other threads, it may fail in CPython 3.11

from services.gateway.openapi import OPERATIONS
from tests.gateway.conftest import Stack

EXAMPLES = 60  # of each operation


@pytest.fixture(scope="module")
def api(stack: Stack) -> schemathesis.BaseSchema:
    page = schemathesis.openapi.from_url(f"{stack.url}/openapi.json")
    assert isinstance(page, OpenApiSchema)
    return page


@pytest.mark.parametrize(
    ("mode", "method", "path"),
    [
        *((GenerationMode.POSITIVE, *named) for named in OPERATIONS),
        *((GenerationMode.NEGATIVE, *named) for named, told in OPERATIONS.items() if 400 in told.errors),
    ],
)
def test_every_operation_does_as_it_says(api: schemathesis.BaseSchema, mode, method: str, path: str) -> None:
    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(case=api[path][method.upper()].as_strategy(generation_mode=mode))
    def ask(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict) and isinstance(model := case.body.get("model"), str) and model:
            case.body["model"] = "one"
        # A page cannot tell which images there are, or which tools a choice may name.
        case.call_and_validate(excluded_checks=[positive_data_acceptance], timeout=60)

    ask()


def test_every_route_is_told_with_its_errors(stack: Stack) -> None:
    page = httpx.get(f"{stack.url}/openapi.json", trust_env=False).json()
    for path, operations in page["paths"].items():
        for operation in operations.values():
            assert operation["tags"] and operation["responses"]["200"]["content"], path
            if path.startswith("/v1/"):
                assert {"401", "403", "503"} <= set(operation["responses"]), path
    chat = page["paths"]["/v1/chat/completions"]["post"]
    assert set(chat["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    for example in chat["requestBody"]["content"]["application/json"]["examples"].values():
        assert stack.post(example["value"] | {"model": "one"}).status_code in (200, 400)  # no example.org from here
