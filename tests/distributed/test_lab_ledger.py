"""On real servers the ledger closes down to the network card: ranks, connections, bytes out of each server, frames."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.commands import SMALL
from tests.distributed.test_lab import lab, possible

__all__ = ["possible"]  # the fixture that looks whether a lab can be made

LARGEST_UNEXPLAINED = 0.0005


def trained(root: Path, shards: Path, *where: str, model: str = "squeezenet1_1", options: tuple[str, ...] = ()) -> Any:
    """ledger.json of a training in the lab."""
    small = [word for word in SMALL if not word.startswith(("batch.", "trainer.", "cluster."))]
    train = [
        f"run_root={root}", f"data.root={shards}", "name=lab", *small, f"model={model}", "model.num_classes=1000",
        "batch.global_size=12", "trainer.max_steps=3", "trainer.validate_every_steps=3", "tracking=disabled", *options,
    ]  # fmt: skip
    ended = lab(root, *where, "--", "python", "-m", "pipeline.train", *train)
    return {"output": ended.output, **json.loads((root / "lab" / "ledger.json").read_text())}


def assert_closed(ledger: Any, num_ranks: int) -> None:
    assert ledger["closed"] is True
    assert ledger["placement"] == "measured"
    assert ledger["transport"]["residual_bytes_per_rank"] == [0] * num_ranks
    servers = ledger["servers"]
    assert servers["measured_egress_bytes"] == servers["predicted_egress_bytes"]
    assert set(servers["interface"]) == {"eth0"}
    for row in ledger["attempts"][0]["measured"]["rows"]:
        assert row["measured_egress_bytes"] == row["predicted_egress_bytes"], row["phase"]
    measured = ledger["attempts"][0]["measured"]
    # On a busy machine the virtual cards drop segments: TCP has sent them twice, the card once.
    sent_again = sum(measured["retransmitted_bytes_per_rank"])
    for card in measured["interfaces"]:
        assert card["segmentation_offload"] is False
        assert card["interface_bytes"] > 3 * ledger["gradient_bytes"] / 2
        unexplained_bytes = abs(card["residual_fraction"]) * card["interface_bytes"]
        assert unexplained_bytes <= LARGEST_UNEXPLAINED * card["interface_bytes"] + sent_again


@pytest.mark.parametrize(("placement", "megabytes"), [("contiguous", 7.42), ("interleaved", 14.84)])
def test_two_servers_of_two_ranks(placement: str, megabytes: float, shards: Path, tmp_path: Path) -> None:
    ledger = trained(tmp_path, shards, "servers=2", "ranks_per_server=2", f"placement={placement}")
    assert_closed(ledger, 4)
    assert ledger["servers"]["measured_egress_bytes"][0] / 3 / 1e6 == pytest.approx(megabytes, abs=0.006)
    assert ("srun --distribution=block" in ledger["output"]) == (placement == "interleaved")


def test_three_servers_with_buffers_compressed_and_accumulating(shards: Path, tmp_path: Path) -> None:
    options = ("comm.hook=bf16", "batch.max_per_rank=2", "data.size=64")
    assert_closed(trained(tmp_path, shards, "servers=3", model="resnet18", options=options), 3)
