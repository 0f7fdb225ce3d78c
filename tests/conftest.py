"""What holds for every test: no deadline by the clock, and in CI nothing skips that its machine could run."""

import os
import re
import signal
from collections.abc import Generator

import pytest
from hypothesis import settings

from tests.small_runs import shards, two_ranks

__all__ = ["shards", "two_ranks"]  # fixtures that several folders share

settings.register_profile("no deadline", deadline=None)  # a loaded machine is no failure
if not os.environ.get(
    "CI"
):  # there hypothesis's own profile holds: no deadline either, and the same examples each time
    settings.load_profile("no deadline")

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A shell starts its background jobs so, and what a test starts would inherit it: Ctrl-C could not be tested.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Hardware that CI's machine may lack. Everything else (packages, root, data) it must have.
HARDWARE = re.compile(r"\b(GPU|AMX|AVX512)")


def _refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turn a skipped report into a failed one, in CI, unless it names hardware."""
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if os.environ.get("CI") and report.skipped and not hasattr(report, "wasxfail") and not HARDWARE.search(reason):
        report.outcome = "failed"
        report.longrepr = f"CI must run this test. {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Tests and fixtures that skip."""
    report = yield
    _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Modules that skip as a whole."""
    report = yield
    _refuse_skip(report)
    return report
