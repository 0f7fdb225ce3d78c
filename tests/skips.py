"""In CI nothing skips that its machine could run."""

import os
import re
from collections.abc import Generator

import pytest

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
