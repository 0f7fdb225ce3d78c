"""What the tests gave, as the table of faults tells it."""

from pathlib import Path

from tests.fault_table import README, read_reports, with_results

REPORT = """<?xml version="1.0" encoding="utf-8"?><testsuites><testsuite>
<testcase classname="tests.faults.test_state" name="test_killed_anywhere[a[0]]" time="2.4" />
<testcase classname="tests.faults.test_state" name="test_killed_anywhere[b]" time="3.0"><failure /></testcase>
<testcase classname="tests.faults.test_state" name="test_another" time="50" />
<testcase classname="tests.unit.run.test_requeue" name="test_one" time="0.5" />
<testcase classname="tests.unit.run.test_requeue" name="test_two" time="0.5"><skipped message="x" /></testcase>
</testsuite></testsuites>"""
TABLE = """# The tests
| | fault | tests | result | remark |
|---|---|---|---|---|
| 1 | a kill | `faults/test_state.py::test_killed_anywhere` * | 9 passed; 9 s | as `others` |
| 9 | a failure | `unit/run/test_requeue.py`<br>`unit/run/test_gone.py::test_gone` | | |

<!-- results -->
Old.
<!-- end of results -->
"""


def written(text: str, tmp_path: Path) -> str:
    (tmp_path / "first.xml").write_text(REPORT)
    again = REPORT.replace("<failure />", "")
    (tmp_path / "second.xml").write_text(again.replace("test_another", "test_a_third"))
    return with_results(text, read_reports([tmp_path / "first.xml", tmp_path / "second.xml"]))


def test_rows_tell_all_cases_and_what_was_not_run(tmp_path: Path) -> None:
    lines = written(TABLE, tmp_path).splitlines()
    assert lines[3] == ("| 1 | a kill | `faults/test_state.py::test_killed_anywhere` * | 2 passed; 5 s | as `others` |")
    assert "| 1 passed, 1 skipped, 1 not run; 1 s | |" in lines[4]


def test_a_later_report_replaces_an_earlier_one_and_all_are_counted(tmp_path: Path) -> None:
    told = written(TABLE, tmp_path)
    assert "**5 passed, 1 skipped**" in told and "Old." not in told


def test_writing_again_changes_nothing(tmp_path: Path) -> None:
    told = written(README.read_text(), tmp_path)
    assert written(told, tmp_path) == told
