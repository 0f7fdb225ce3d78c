"""The meter on real DDP over gloo, two and three ranks: what is recorded, what it must not change, what survives."""

from typing import Any

import pytest

from tests.distributed.meter_ranks import run_ranks

Results = list[dict[str, Any]]


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What every rank found; all scenarios run in one start of the processes."""
    out = tmp_path_factory.mktemp("ranks")
    return run_ranks("meter_ddp_rank.py", request.param, out, env={"TORCH_FR_BUFFER_SIZE": "2000"})


def bytes_of(ledger: dict[str, Any], **wanted: object) -> int:
    """Payload bytes of the rows that match."""
    rows = ledger["collectives"]
    return sum(row["payload_bytes"] for row in rows if all(row[key] == value for key, value in wanted.items()))


def test_squeezenet_at_default_buckets(ranks: Results) -> None:
    squeezenet = ranks[0]["squeezenet"]
    ledger = squeezenet["json"]
    owed = 4_941_984  # four bytes for each of 1,235,496 parameters
    assert ledger["gradient_bytes"] == owed
    assert bytes_of(ledger, origin="gradients", phase="train") == 2 * owed
    assert [bucket["bytes"] for bucket in ledger["buckets"]] == [2_048_000, 2_893_984]
    assert [bucket["num_parameters"] for bucket in ledger["buckets"]] == [1, 51]
    for step in squeezenet["steps"]:
        assert step["comm/gradient_bytes"] == step["comm/payload_bytes"] == owed
    if len(ranks) == 2:
        assert all(step["comm/transport_bytes"] == 4_943_136 for step in squeezenet["steps"])


def test_layers_share_the_gradient_bytes(ranks: Results) -> None:
    layers = ranks[0]["squeezenet"]["json"]["layers"]
    assert sum(layer["bytes"] for layer in layers) == 4_941_984
    assert sum(layer["share"] for layer in layers) == pytest.approx(1)
    (classifier,) = (layer for layer in layers if layer["name"] == "classifier.1")
    assert classifier["bytes"] == 4 * (512 * 1000 + 1000)


def test_start_up_is_told_apart(ranks: Results) -> None:
    """Construction broadcasts the parameters once; the warm-up reduces gradients twice; training holds neither."""
    ledger = ranks[0]["squeezenet"]["json"]
    assert bytes_of(ledger, origin="gradients", phase="startup") == 2 * ledger["gradient_bytes"]
    assert bytes_of(ledger, origin="parameters", phase="train") == 0
    assert bytes_of(ledger, origin="parameters", phase="startup", op="broadcast") >= ledger["gradient_bytes"]


def test_all_ranks_predict_alike(ranks: Results) -> None:
    for result in ranks[1:]:
        assert result["squeezenet"]["json"] == ranks[0]["squeezenet"]["json"]


def test_buffers_and_bitmap_are_rows_of_their_own(ranks: Results) -> None:
    scenario = ranks[0]["batch_norm_with_unused"]
    ledger = scenario["json"]
    buffer_bytes = 2 * 37 * 4 + 8  # running mean and variance; number of batches
    assert bytes_of(ledger, origin="buffers", phase="train") == 2 * buffer_bytes
    assert bytes_of(ledger, origin="other", phase="train") == 2 * 4 * 10  # int32 per parameter: who was used
    assert bytes_of(ledger, origin="gradients", phase="train") == 2 * ledger["gradient_bytes"]


def test_accumulation_moves_gradients_once(ranks: Results) -> None:
    first, accumulated = ranks[0]["batch_norm_with_unused"]["steps"]
    assert accumulated["comm/gradient_bytes"] == first["comm/gradient_bytes"]
    assert accumulated["comm/transport_bytes"] == first["comm/transport_bytes"]


def test_warm_up_restores_buffers(ranks: Results) -> None:
    assert all(result["batch_norm_with_unused"]["restored"] for result in ranks)


@pytest.mark.parametrize("hook", ["fp16", "bf16"])
def test_compression_halves_what_is_issued(ranks: Results, hook: str) -> None:
    plain, halved = ranks[0]["hooks"]["none"], ranks[0]["hooks"][hook]
    assert halved["comm/gradient_bytes"] == plain["comm/gradient_bytes"]
    assert 2 * halved["comm/payload_bytes"] == plain["comm/payload_bytes"]


def test_weights_do_not_depend_on_the_meter(ranks: Results) -> None:
    for result in ranks:  # ranks differ among themselves: running statistics are local between two broadcasts
        assert len(set(result["neutral"].values())) == 1


def test_resumed_weights_are_the_unbroken_runs(ranks: Results) -> None:
    """At three ranks this fails without the warm-up of the buckets."""
    for result in ranks:
        assert result["resume"]["resumed"]["digest"] == result["resume"]["whole"]["digest"]


def test_resumed_totals_are_the_unbroken_runs(ranks: Results) -> None:
    whole, resumed = ranks[0]["resume"]["whole"], ranks[0]["resume"]["resumed"]
    assert resumed["steps"] == whole["steps"][3:]  # comm/total_gigabytes among it
    for ledger in (whole["json"], resumed["json"]):
        assert ledger["num_steps"] == 6
    for path in (("transport", "predicted_bytes_per_rank"), ("servers", "predicted_egress_bytes")):
        assert resumed["json"][path[0]][path[1]] == whole["json"][path[0]][path[1]]
    for origin in ("gradients", "buffers"):
        assert bytes_of(resumed["json"], origin=origin, phase="train", committed=True) == bytes_of(
            whole["json"], origin=origin, phase="train", committed=True
        )


def test_lost_work_stays_with_the_attempt_that_did_it(ranks: Results) -> None:
    ledger = ranks[0]["resume"]["resumed"]["json"]
    assert bytes_of(ledger, attempt=1, committed=False, origin="gradients") == ledger["gradient_bytes"]
    assert bytes_of(ledger, attempt=2, committed=False) == 0
    assert bytes_of(ledger, attempt=2, phase="startup") == bytes_of(ledger, attempt=1, phase="startup") > 0
    told, last = ledger["attempts"]
    assert (told["first_step"], last["first_step"]) == (0, 3)
    assert told["lost_payload_bytes"] is None  # it was cut off: there may have been more
    assert "attempts.0.lost_payload_bytes" in ledger["null_reasons"]
    assert last["lost_payload_bytes"] == 0


def test_recorded_collectives_equal_torchs_flight_recorder(ranks: Results) -> None:
    for result in ranks:
        assert result["flight_recorder"]["meter"] == result["flight_recorder"]["recorder"]


def test_gradients_past_the_hook_are_an_error(ranks: Results) -> None:
    for result in ranks:
        assert "no gradient through DDP's communication hook" in result["silent_hook"]
