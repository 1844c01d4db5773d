"""schemathesis over every operation of a running server's own document.

The requests are made from the document, well-formed and not, the same ones in every run of the tests.
No answer may be a 5xx, and each must be of a documented status, content type and schema; what the
document forbids must be refused.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import schemathesis
from schemathesis import Case

from tests.contract import document
from tests.contract.subject import Subject
from tests.support.stack import RunningStack

CONFIG = {
    "generation": {"deterministic": True, "max-examples": 6, "database": "none"},
    "request-timeout": 40,
    "phases": {"examples": {"enabled": False}, "coverage": {"enabled": True}},
    "checks": {
        # What the document cannot say (a token beyond the vocabulary, a model that is not there) is 422.
        "positive_data_acceptance": {"enabled": False},
    },
}


schema = schemathesis.openapi.from_dict(
    document.make()[0], config=schemathesis.Config.from_dict(CONFIG)
)


@pytest.fixture(scope="module")
def subject(stack: RunningStack) -> Iterator[Subject]:
    """A user for the generated requests."""
    made = Subject(stack)
    yield made
    made.close()


@schema.parametrize()
def test_answers_are_as_documented(case: Case, subject: Subject) -> None:
    subject.aim(case)
    response = case.call(base_url=subject.base_url, headers=subject.headers)
    subject.tidy(case, response)
    case.validate_response(response)
