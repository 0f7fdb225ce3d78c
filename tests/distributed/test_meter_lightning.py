"""The metered strategy under Lightning's Trainer: origins, phases, resume, and weights the meter does not touch."""

from typing import Any

import pytest

from tests.distributed.meter_ranks import run_ranks

NUM_STEPS, NUM_MICRO_BATCHES = 6, 2

Results = list[dict[str, Any]]


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What every rank found."""
    return run_ranks("meter_lightning_rank.py", request.param, tmp_path_factory.mktemp("ranks"))


def rows_of(ledger: dict[str, Any], **wanted: object) -> list[dict[str, Any]]:
    """The rows that match."""
    return [row for row in ledger["collectives"] if all(row[key] == value for key, value in wanted.items())]


def test_lightnings_broadcast_is_a_row_of_its_own(ranks: Results) -> None:
    """One int64 before every micro-batch, and nothing else of Lightning's while training."""
    (row,) = rows_of(ranks[0]["whole"]["json"], origin="lightning", phase="train")
    assert (row["op"], row["num_calls"]) == ("broadcast", NUM_STEPS * NUM_MICRO_BATCHES)
    assert row["payload_bytes"] == 8 * row["num_calls"]


def test_the_hook_runs_on_cpu(ranks: Results) -> None:
    ledger = ranks[0]["whole"]["json"]
    (row,) = rows_of(ledger, origin="gradients", phase="train")
    assert len(ledger["buckets"]) == 2
    assert row["num_calls"] == NUM_STEPS * len(ledger["buckets"])
    assert row["payload_bytes"] == NUM_STEPS * ledger["gradient_bytes"]


def test_every_step_moves_the_same(ranks: Results) -> None:
    """The first like the last, and those around validation like the others."""
    rows = ranks[0]["whole"]["rows"]
    assert len(rows) == NUM_STEPS
    assert len({row["comm/payload_bytes"] for row in rows}) == 1
    assert len({row["comm/transport_bytes"] for row in rows}) == 1


def test_nothing_in_training_is_unclaimed(ranks: Results) -> None:
    ledger = ranks[0]["whole"]["json"]
    assert {row["origin"] for row in rows_of(ledger, phase="train")} == {"gradients", "buffers", "metrics", "lightning"}
    assert {row["origin"] for row in rows_of(ledger, phase="validation")} == {"buffers"}
    assert ledger["layers"][0]["name"] == "0"  # the learner's "model." is not part of a layer's name


def test_checkpoint_is_a_phase(ranks: Results) -> None:
    assert rows_of(ranks[0]["first"]["json"], phase="checkpoint")
    assert not rows_of(ranks[0]["whole"]["json"], phase="checkpoint")


def test_weights_do_not_depend_on_the_meter(ranks: Results) -> None:
    assert len({result[run]["digest"] for result in ranks for run in ("whole", "plain")}) == 1


def test_meter_off_leaves_nulls_with_reasons(ranks: Results) -> None:
    plain = ranks[0]["plain"]
    assert plain["rows"] == [{}] * NUM_STEPS
    assert plain["json"]["transport"]["predicted_bytes_per_rank"] is None
    assert plain["json"]["per_step"]["payload_bytes"] is None
    assert "off" in plain["json"]["null_reasons"]["per_step.payload_bytes"]


def test_resumed_run_equals_the_unbroken_one(ranks: Results) -> None:
    for result in ranks:
        whole, resumed = result["whole"], result["resumed"]
        assert resumed["digest"] == whole["digest"]
        assert result["first"]["rows"] + resumed["rows"] == whole["rows"]
        assert resumed["json"]["transport"] == whole["json"]["transport"]
        assert resumed["json"]["servers"] == whole["json"]["servers"]


def test_every_null_has_a_reason(ranks: Results) -> None:
    for run in ("whole", "plain", "first", "resumed"):
        ledger = ranks[0][run]["json"]
        assert set(null_paths(ledger)) == set(ledger["null_reasons"])


def null_paths(value: Any, path: str = "") -> list[str]:
    """Paths of all nulls, as null_reasons writes them."""
    if value is None:
        return [path]
    if isinstance(value, dict):
        return [found for key, inner in value.items() for found in null_paths(inner, f"{path}.{key}".lstrip("."))]
    if isinstance(value, list):
        return [found for index, inner in enumerate(value) for found in null_paths(inner, f"{path}.{index}")]
    return []
