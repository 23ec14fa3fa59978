"""Fixtures that every test may use, and a guard: a test whose log holds an unexpected warning or traceback fails."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator

import pytest


@pytest.fixture
def expect_log(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Call with a regular expression: log records of level WARNING and above whose message it finds are expected."""
    patterns: list[str] = []
    request.node.stash[_EXPECTED] = patterns
    return patterns.append


_EXPECTED = pytest.StashKey[list[str]]()


@pytest.fixture(autouse=True)
def _unexpected_log_fails(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """As in s3ql: warnings that nobody expected are how silent damage shows first."""
    yield
    expected = request.node.stash.get(_EXPECTED, [])
    records = [record for phase in ("setup", "call") for record in caplog.get_records(phase)]
    unexpected = [
        f"{record.name}: {record.levelname}: {record.getMessage()}"
        for record in records
        if (record.levelno >= logging.WARNING or record.exc_info)
        and not any(re.search(pattern, record.getMessage()) for pattern in expected)
    ]
    if unexpected:
        pytest.fail("unexpected in the log:\n" + "\n".join(unexpected), pytrace=False)
