"""Two servers whose network falters (faltering_link.py): time alone is lost; or all ranks end, and come back.

`pytest -m slow -s tests/distributed/test_faltering.py` prints the table of docs/survival.md.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.commands import HERE, SMALL, TRAIN_RECORDED, fired, run, train
from tests.comparing import differences, load
from tests.distributed.test_lab import PATH, REPOSITORY, possible
from tests.sharing import made_once

__all__ = ["possible"]

STEP_TIMEOUT_SECONDS = 60
OPTIONS = (*SMALL, "trainer.max_steps=6", "cluster.timeout_seconds=120", "tracking=disabled")
LARGEST_UNEXPLAINED = 0.0005
"""Of a card's bytes, beside selective acknowledgements."""


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two ranks learn on one machine."""
    root = made_once(tmp_path_factory, "undisturbed", lambda root: train(root, shards, "run", 2, *OPTIONS))
    return load(root / "run")["state_dict"]


def train_apart(
    root: Path,
    shards: Path,
    link: dict[str, float],
    *options: str,
    later: dict[str, float] | None = None,
    mtus: dict[str, int] | None = None,
    expect: int = 0,
) -> tuple[str, list[dict[str, int]]]:
    """Train on two servers as `root/run`.

    Args:
        root: Where.
        shards: What is trained on.
        link: The conditions of both links.
        options: More of the command.
        later: The conditions from within step 5 on.
        mtus: Of the ranks' cards, where they are not 1500.
        expect: The exit code.

    Returns:
        What was printed, and what the links counted, by rank.
    """
    place = root / "link"
    place.mkdir(exist_ok=True)
    (place / "link.json").write_text(json.dumps(link))
    (place / "later.json").write_text(json.dumps(later))
    before = len(fired(place))
    environment = {"PATH": PATH, "FED_TO": str(place), "LINK_MTUS": json.dumps(mtus or {})}
    if later is not None:
        environment |= {"KILL_AT": "0 4 backward shell", "DO": f"cp {place}/later.json {place}/link.json"}
    lab = ["-m", "pipeline.lab", f"run_root={root}", "servers=2", "num_threads=1", "--"]
    behind = ["python", str(HERE / "distributed/faltering_link.py"), str(place), "--"]
    patience = f"cluster.step_timeout_seconds={STEP_TIMEOUT_SECONDS}"
    where = [str(TRAIN_RECORDED), f"run_root={root}", f"data.root={shards}", "name=run", *OPTIONS, patience, *options]
    python = str(REPOSITORY / ".venv/bin/python")
    output = run([*lab, *behind, python, *where], expect=expect, cwd=REPOSITORY, environment=environment).output
    assert len(fired(place)) - before == (later is not None), output
    return output, [json.loads((place / f"link.{rank}.json").read_text()) for rank in (0, 1)]


def assert_closed(root: Path, links: list[dict[str, int]]) -> dict[str, Any]:
    """From the model to the card: all is explained. Returns ledger.json."""
    ledger = json.loads((root / "run/ledger.json").read_text())
    assert ledger["closed"] is True and ledger["transport"]["residual_bytes_per_rank"] == [0, 0]
    assert ledger["servers"]["measured_egress_bytes"] == ledger["servers"]["predicted_egress_bytes"]
    for card, link in zip(ledger["attempts"][-1]["measured"]["interfaces"], links, strict=True):
        unexplained_bytes = card["interface_bytes"] - card["tcp_bytes"] - card["header_bytes"]
        slack_bytes = LARGEST_UNEXPLAINED * card["interface_bytes"]
        assert -slack_bytes <= unexplained_bytes <= card["sack_bytes_at_most"] + slack_bytes, card
        assert abs(unexplained_bytes - link["option_bytes"]) <= slack_bytes, (card, link)
        assert card["retransmitted_bytes"] <= card["tcp_bytes"] - ledger["gradient_bytes"]
    return ledger


def sent_again(ledger: dict[str, Any]) -> int:
    """Over both cards and the last attempt."""
    return sum(card["retransmitted_bytes"] for card in ledger["attempts"][-1]["measured"]["interfaces"])


def assert_gone(output: str) -> None:
    """Every rank says that it is the network, and the launcher what to do."""
    assert output.count("error: Rank ") == 2 and output.count("or the network is gone") == 2, output
    assert output.count("launcher: the ranks lost one another") == 1 and "Traceback" not in output, output


def test_a_network_that_spoils_frames_and_then_is_gone(
    undisturbed: dict[str, Any], shards: Path, tmp_path: Path
) -> None:
    """One frame in a hundred is lost, doubled, damaged or late; in step 5 all are lost; then the same command again."""
    spoilt = {"loss": 0.01, "duplicate": 0.01, "corrupt": 0.01, "reorder": 0.01}
    patience = "cluster.step_timeout_seconds=8"
    output, _ = train_apart(tmp_path, shards, spoilt, patience, later={"loss": 1.0}, expect=75)
    ((cut, _),) = fired(tmp_path / "link")
    assert time.time() - cut < 8 + 60  # a loaded machine
    assert_gone(output)
    for rank in (0, 1):
        assert f"what rank {rank} sent to 10.77.0.{2 - rank} does not arrive" in output

    output, links = train_apart(tmp_path, shards, spoilt, patience)
    assert "resumed from" in output
    assert all(sum(link[kind] for link in links) > 0 for kind in spoilt), links
    assert not differences(undisturbed, load(tmp_path / "run")["state_dict"])
    ledger = assert_closed(tmp_path, links)
    assert sent_again(ledger) > 0
    assert all(again > 0 for again in ledger["transport"]["retransmitted_bytes_per_rank"])


# --- the whole matrix ---

CASES: dict[str, dict[str, Any]] = {
    "nothing": {"link": {}},
    "1 % of frames lost": {"link": {"loss": 0.01}},
    "5 % of frames lost": {"link": {"loss": 0.05}},
    "50 ms more each way": {"link": {"delay_seconds": 0.05}},
    "200 ms more each way": {"link": {"delay_seconds": 0.2}},
    "5 % of frames 20 ms late": {"link": {"reorder": 0.05}},
    "5 % of frames twice": {"link": {"duplicate": 0.05}},
    "0.1 % of frames with a flipped bit": {"link": {"corrupt": 0.001}},
    "MTU 1500 and 1400": {"link": {}, "mtus": {"1": 1400}},
    "cut for 1 s": {"link": {}, "later": {"loss": 1.0, "for_seconds": 1}},
    "cut for 10 s": {"link": {}, "later": {"loss": 1.0, "for_seconds": 10}},
    "100 Mbit/s, for 60 s 1 Mbit/s": {
        "link": {"bits_per_second": 1e8},
        "later": {"bits_per_second": 1e6, "for_seconds": 60},
    },
}


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    """Rows, printed when all have been measured."""
    rows = [
        "| network | hit frames | seconds | ledger | sent again | card unexplained | weights |",
        "|---|" + "---:|" * 6,
    ]
    yield rows
    print("\n" + "\n".join(rows))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_what_comes_late_costs_time_alone(
    name: str, table: list[str], undisturbed: dict[str, Any], shards: Path, tmp_path: Path
) -> None:
    began, case = time.monotonic(), CASES[name]
    _, links = train_apart(tmp_path, shards, **case)
    seconds = time.monotonic() - began
    kinds = ["for_seconds"] if "later" in case else list(case["link"])
    hit = [sum(link[kind] for link in links) for kind in kinds]
    assert all(hit), links
    assert {link["longest_frame"] for link in links} == {14 + min([1500, *case.get("mtus", {}).values()])}
    assert not differences(undisturbed, load(tmp_path / "run")["state_dict"])
    ledger = assert_closed(tmp_path, links)
    if {"loss", "corrupt"} & {*case["link"], *case.get("later", {})}:
        assert sent_again(ledger) > 0
    unexplained = max(map(abs, ledger["servers"]["residual_fraction"]))
    frames = f"{sum(hit):,} of {sum(link['frames'] for link in links):,}" if hit else ""
    again = f"{sent_again(ledger):,} B"
    table.append(f"| {name} | {frames} | {seconds:.0f} | closed, 0 B | {again} | {unexplained:.3%} | the same |")


@pytest.mark.slow
def test_a_network_that_loses_all_large_frames_ends_the_run_before_its_first_step(
    undisturbed: dict[str, Any], shards: Path, tmp_path: Path
) -> None:
    """A tunnel on the way carries less than the cards are told, and says nothing: small words pass, tensors do not."""
    patience = ("cluster.timeout_seconds=20", "cluster.step_timeout_seconds=8")
    began = time.monotonic()
    output, links = train_apart(tmp_path, shards, {"largest_frame": 1400}, *patience, expect=75)
    assert time.monotonic() - began < 20 + 100
    assert sum(link["largest_frame"] for link in links) > 0
    assert_gone(output)
    assert "is the MTU the same" in output and "before the first step" in output
    _, links = train_apart(tmp_path, shards, {"largest_frame": 1414}, mtus={"0": 1400, "1": 1400})
    assert not differences(undisturbed, load(tmp_path / "run")["state_dict"])
