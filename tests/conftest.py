"""What all tests share: the rule about skips, and the programs that a test talks to."""

from __future__ import annotations

import os
import shutil

import pytest
from hypothesis import settings

IN_CI = os.environ.get("CI", "").lower() not in ("", "0", "false")

# The same examples in each run: a failure seen once is seen again. No deadline: two processes share two cores.
settings.register_profile("proxmon", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("proxmon")


# --- skips: at a desk a missing program leaves its tests out; in CI that is a failure ---


def find_program(name: str) -> str:
    """The path of a program that a test talks to; without it the test is left out, and fails in CI."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed: run ./build.sh test as root on Debian, or install it")
    return path


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """In CI every skip, whatever made it, is a failure: nothing is green that was not run."""
    report = yield
    if IN_CI and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"skipped in CI: {call.excinfo.value if call.excinfo else 'no reason given'}"
    return report
