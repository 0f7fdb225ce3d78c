"""Write what a run of the tests gave into the table of faults in README.md: how many passed, in how many seconds.

    python -m tests.fault_table REPORT.xml...

The reports are pytest's (--junit-xml); of a test in several of them the last one counts.
"""

import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from benchmarks.common import conditions

README = Path(__file__).parent / "README.md"
HEADER = "| | fault | tests | result | remark |"
SUMMARY = re.compile(r"(?<=<!-- results -->\n).*?(?=\n<!-- end of results -->)", re.DOTALL)


class Ended(NamedTuple):
    """How one test ended."""

    outcome: str
    seconds: float


def read_reports(paths: list[Path]) -> dict[str, Ended]:
    """By `folder/file.py::test[case]`, as pytest names it below tests/."""
    found = {}
    for path in paths:
        for case in ElementTree.parse(path).getroot().iter("testcase"):
            kinds = {child.tag for child in case}
            outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
            file = case.attrib["classname"].removeprefix("tests.").replace(".", "/") + ".py"
            found[f"{file}::{case.attrib['name']}"] = Ended(outcome, float(case.attrib["time"]))
    return found


def result_of(tests: str, ended: dict[str, Ended]) -> str:
    """Of a row that names these tests (`file` or `file::test`)."""
    names = re.findall(r"`([\w/]+\.py(?:::test_\w+)?)`", tests)
    cases_by_name = {
        name: [case for label, case in ended.items() if name in (label.partition("[")[0], label.partition("::")[0])]
        for name in names
    }
    cases = [case for found in cases_by_name.values() for case in found]
    counts = Counter(case.outcome for case in cases)
    counts["not run"] = sum(not found for found in cases_by_name.values())
    told = ", ".join(f"{counts[kind]} {kind}" for kind in ("passed", "failed", "skipped", "not run") if counts[kind])
    return f"{told}; {sum(case.seconds for case in cases):.0f} s"


def summary(ended: dict[str, Ended]) -> str:
    """All tests, machine, versions and date in a sentence."""
    counts = Counter(case.outcome for case in ended.values())
    told, minutes = conditions(), sum(case.seconds for case in ended.values()) / 60
    cpu, packages = told["cpu"], told["packages"]
    outcomes = ", ".join(f"{counts[kind]:,} {kind}" for kind in ("passed", "failed", "skipped") if counts[kind])
    versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "pytorch-lightning"))
    return (
        f"All tests, slow ones too: **{outcomes}** in {minutes:.0f} minutes on {cpu['num_cores']} cores of"
        f" {cpu['model']}; {versions}; {told['date']}, commit {told['git']['commit'][:7]}."
    )


def with_results(text: str, ended: dict[str, Ended]) -> str:
    """README.md with the column `result` and the summary written anew."""
    lines = text.splitlines()
    start = lines.index(HEADER) + 2
    for number in range(start, len(lines)):
        if not lines[number].startswith("|"):
            break
        row, fault, tests, _, remark = (cell.strip() for cell in lines[number].strip("|").split("|"))
        lines[number] = f"| {row} | {fault} | {tests} | {result_of(tests, ended)} | {remark} |".replace("|  |", "| |")
    return SUMMARY.sub(lambda _: summary(ended), "\n".join(lines) + "\n")


if __name__ == "__main__":
    README.write_text(with_results(README.read_text(), read_reports([Path(argument) for argument in sys.argv[1:]])))
