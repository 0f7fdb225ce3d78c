"""Trainings on servers of the lab whose network falters (faltering_link.py), and what must hold of them.

Used by the tests and by `benchmarks/faltering_network.py`, which publishes what is measured.
"""

import json
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.commands import HERE, SMALL, TRAIN_RECORDED, fired, run, train
from tests.comparing import differences, load
from tests.distributed.test_lab import PATH, REPOSITORY

STEP_TIMEOUT_SECONDS = 60
OPTIONS = (*SMALL, "trainer.max_steps=6", "cluster.timeout_seconds=120", "tracking=disabled")
LARGEST_UNEXPLAINED = 0.0005
"""Of a card's bytes, beside selective acknowledgements."""
BUSY_SECONDS = 60
"""What a loaded machine may add to a patience."""
Weights = dict[str, Any]


@dataclass(frozen=True)
class Network:
    """What happens to the frames of every server."""

    link: dict[str, float] = field(default_factory=dict[str, float])
    later: dict[str, float] | None = None
    """From within step 5 on."""
    mtus: dict[str, int] = field(default_factory=dict[str, int])
    """Of the ranks' cards, where they are not 1500."""
    num_servers: int = 2


NETWORKS: dict[str, Network] = {
    "nothing": Network(),
    "1 % of frames lost": Network({"loss": 0.01}),
    "1 % of frames lost, 3 servers": Network({"loss": 0.01}, num_servers=3),
    "5 % of frames lost": Network({"loss": 0.05}),
    "50 ms more each way": Network({"delay_seconds": 0.05}),
    "200 ms more each way": Network({"delay_seconds": 0.2}),
    "5 % of frames 20 ms late": Network({"reorder": 0.05}),
    "5 % of frames twice": Network({"duplicate": 0.05}),
    "0.1 % of frames with a flipped bit": Network({"corrupt": 0.001}),
    "MTU 1500 and 1400": Network(mtus={"1": 1400}),
    "cut for 1 s": Network(later={"loss": 1.0, "for_seconds": 1}),
    "cut for 10 s": Network(later={"loss": 1.0, "for_seconds": 10}),
    "100 Mbit/s, for 60 s 1 Mbit/s": Network({"bits_per_second": 1e8}, {"bits_per_second": 1e6, "for_seconds": 60}),
}
"""That cost time alone."""


def undisturbed(root: Path, shards: Path, num_servers: int) -> Weights:
    """What so many ranks learn on one machine."""
    name = f"undisturbed{num_servers}"
    if not (root / name).exists():
        train(root, shards, name, num_servers, *OPTIONS)
    return load(root / name)["state_dict"]


def train_apart(
    root: Path, shards: Path, network: Network, *options: str, expect: int = 0, has_launcher: bool = True
) -> tuple[str, list[dict[str, int]]]:
    """Train on servers of the lab as `root/run`.

    Args:
        root: Where.
        shards: What is trained on.
        network: Between them.
        options: More of the command.
        expect: The exit code.
        has_launcher: Whether the ranks know who started them; else they are as if started by hand.

    Returns:
        What was printed, and what the links counted, by rank.
    """
    place = root / "link"
    place.mkdir(exist_ok=True)
    (place / "link.json").write_text(json.dumps(network.link))
    (place / "later.json").write_text(json.dumps(network.later))
    before = len(fired(place))
    environment = {"PATH": PATH, "FED_TO": str(place), "LINK_MTUS": json.dumps(network.mtus)}
    if network.later is not None:
        environment |= {"KILL_AT": "0 4 backward shell", "DO": f"cp {place}/later.json {place}/link.json"}
    lab = ["-m", "pipeline.lab", f"run_root={root}", f"servers={network.num_servers}", "num_threads=1", "--"]
    behind = ["python", str(HERE / "distributed/faltering_link.py"), str(place), "--"]
    alone = [] if has_launcher else ["env", "--unset=SQUEEZEWIRE_CAUSES_PIPE"]
    patience = f"cluster.step_timeout_seconds={STEP_TIMEOUT_SECONDS}"
    where = [str(TRAIN_RECORDED), f"run_root={root}", f"data.root={shards}", "name=run", *OPTIONS, patience, *options]
    python = str(REPOSITORY / ".venv/bin/python")
    ended = run([*lab, *behind, *alone, python, *where], expect=expect, cwd=REPOSITORY, environment=environment)
    assert len(fired(place)) - before == (network.later is not None), ended.output
    links = [json.loads((place / f"link.{rank}.json").read_text()) for rank in range(network.num_servers)]
    return ended.output, links


def assert_closed(root: Path, links: list[dict[str, int]]) -> dict[str, Any]:
    """From the model to the card: all is explained. Returns ledger.json."""
    ledger = json.loads((root / "run/ledger.json").read_text())
    assert ledger["closed"] is True and ledger["transport"]["residual_bytes_per_rank"] == [0] * len(links)
    assert ledger["servers"]["measured_egress_bytes"] == ledger["servers"]["predicted_egress_bytes"]
    for card, link in zip(ledger["attempts"][-1]["measured"]["interfaces"], links, strict=True):
        unexplained_bytes = card["interface_bytes"] - card["tcp_bytes"] - card["header_bytes"]
        slack_bytes = LARGEST_UNEXPLAINED * card["interface_bytes"]
        assert -slack_bytes <= unexplained_bytes <= card["sack_bytes_at_most"] + slack_bytes, card
        assert abs(unexplained_bytes - link["option_bytes"]) <= slack_bytes, (card, link)
        assert card["retransmitted_bytes"] <= card["tcp_bytes"] - ledger["gradient_bytes"]
    return ledger


def sent_again(ledger: dict[str, Any]) -> int:
    """Bytes, over all cards and the last attempt."""
    return sum(card["retransmitted_bytes"] for card in ledger["attempts"][-1]["measured"]["interfaces"])


def assert_gone(output: str, *, has_launcher: bool = True) -> None:
    """Every rank says that it is the network and names the other one, and the launcher says what to do."""
    # The first to give up closes its connections, by which the other one, started by hand, may hear of it first.
    assert output.count("error: Rank ") == 2, output
    assert output.count("or the network is gone") in ((2,) if has_launcher else (1, 2)), output
    assert output.count("launcher: the ranks lost one another") == has_launcher and "Traceback" not in output, output
    # Where small words still pass, the second to give up hears that the first has.
    ends = "does not answer" if has_launcher else "(does not answer|has ended, too)"
    for rank in (0, 1):
        assert re.search(rf"error: Rank {rank} lost .*10\.77\.0\.{2 - rank} .*{ends}", output), output
    assert "does not answer" in output, output


def measure(name: str, shards: Path, root: Path) -> dict[str, Any]:
    """Train behind one of NETWORKS, and see that time alone was lost. Returns a row."""
    network = NETWORKS[name]
    weights = undisturbed(root.parent, shards, network.num_servers)
    root.mkdir(exist_ok=True)
    began = time.monotonic()
    _, links = train_apart(root, shards, network)
    seconds = time.monotonic() - began
    kinds = list(network.link) if network.later is None else ["for_seconds"]
    hit = [sum(link[kind] for link in links) for kind in kinds]
    assert all(hit), links
    assert {link["longest_frame"] for link in links} == {14 + min([1500, *network.mtus.values()])}
    assert not differences(weights, load(root / "run")["state_dict"])
    ledger = assert_closed(root, links)
    if {"loss", "corrupt"} & {*network.link, *(network.later or {})}:
        assert sent_again(ledger) > 0
    return {
        "network": name,
        "servers": network.num_servers,
        "frames_hit": sum(hit) if kinds else None,
        "frames": sum(link["frames"] for link in links),
        "seconds": seconds,
        "residual_bytes": sum(map(abs, ledger["transport"]["residual_bytes_per_rank"])),
        "retransmitted_bytes": sent_again(ledger),
        "unexplained_fraction": max(map(abs, ledger["servers"]["residual_fraction"])),
    }


def measure_cut_for_ever(shards: Path, root: Path, link: dict[str, float]) -> dict[str, Any]:
    """All frames are lost from step 5 on; then the same command again, behind `link` alone. Returns a row."""
    root.mkdir(exist_ok=True)
    patience_seconds = 8
    patience = f"cluster.step_timeout_seconds={patience_seconds}"
    output, _ = train_apart(root, shards, Network(link, {"loss": 1.0}), patience, expect=75)
    ((cut, _),) = fired(root / "link")
    seconds = time.time() - cut
    assert seconds < patience_seconds + BUSY_SECONDS
    assert_gone(output)
    # Of a rank whose words had all arrived before the cut there is nothing that could not.
    assert any(f"what rank {rank} sent to 10.77.0.{2 - rank} does not arrive" in output for rank in (0, 1)), output

    output, links = train_apart(root, shards, Network(link), patience)
    assert "resumed from" in output
    assert all(sum(spoilt[kind] for spoilt in links) > 0 for kind in link), links
    assert not differences(undisturbed(root.parent, shards, 2), load(root / "run")["state_dict"])
    ledger = assert_closed(root, links)
    if link:
        assert sent_again(ledger) > 0
        assert all(again > 0 for again in ledger["transport"]["retransmitted_bytes_per_rank"])
    return {
        "network": "cut for ever",
        "patience_seconds": patience_seconds,
        "seconds_until_all_ended": seconds,
        "exit_code": 75,
        "then": "the same command goes on to the same weights",
    }


def measure_large_frames(shards: Path, root: Path) -> dict[str, Any]:
    """A tunnel on the way carries less than the cards are told, and says nothing: small words pass, tensors do not.

    The ranks are as if started by hand. Then with the tunnel's MTU on both cards. Returns a row.
    """
    root.mkdir(exist_ok=True)
    patience_seconds = 20
    patience = (f"cluster.timeout_seconds={patience_seconds}", "cluster.step_timeout_seconds=8")
    began = time.monotonic()
    tunnel = Network({"largest_frame": 1400})
    output, links = train_apart(root, shards, tunnel, *patience, expect=75, has_launcher=False)
    seconds = time.monotonic() - began
    assert seconds < patience_seconds + 40 + BUSY_SECONDS
    assert sum(link["largest_frame"] for link in links) > 0
    assert_gone(output, has_launcher=False)
    assert "is the MTU the same" in output and "before the first step" in output
    _, links = train_apart(root, shards, Network({"largest_frame": 1414}, mtus={"0": 1400, "1": 1400}))
    assert not differences(undisturbed(root.parent, shards, 2), load(root / "run")["state_dict"])
    return {
        "network": "all frames above 1,400 bytes lost",
        "patience_seconds": patience_seconds,
        "seconds_until_all_ended": seconds,
        "exit_code": 75,
        "then": "an MTU of 1400 on both cards mends it",
    }
