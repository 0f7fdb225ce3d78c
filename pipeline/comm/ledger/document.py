"""The sections of ledger.json, predicted beside measured. What is not known is `Missing`, with its reason.

`Ledger.to_json` puts the sections together and turns what is missing into nulls.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.comm.collectives import Bucket, Call
from pipeline.comm.ledger.attempts import METER_OFF, Attempt
from pipeline.comm.ledger.traffic import Sent, StepTraffic
from pipeline.comm.step_times import MedianTimes, bucket_fields, time_fields
from pipeline.core.missing import Missing, known
from pipeline.core.schemas.ledger import CallJson, LayerJson

WORLD_OF_ONE = "A world of one exchanges nothing."
ASSUMED = Missing(
    "Each rank is taken as a server of its own (placement: assumed), so nothing leaves a server that could be read."
)
NO_CARD = Missing(
    "The network card that carries the job was not read on every server (none in this container? `meter` reads none)."
)
NO_STEP = Missing("This attempt has completed no step.")
NO_TIME = "No time was handed to the ledger."
TCP_COUNTER = "TCP_INFO of the job's connections to other servers: bytes handed to TCP, each once"

Section = dict[str, object]
"""A section of ledger.json with `Missing` in place of its nulls."""


@dataclass(frozen=True)
class Conditions:
    """What `ledger.json` says about the run beside its bytes."""

    run: str
    """Name of the run."""
    model: str
    """Name of the model."""
    hook: str
    """Gradient compression (`comm.hook`)."""
    global_batch: int | Missing
    """Pictures per step over all ranks."""
    step_seconds_p50: float | None = None
    """Median seconds of a step."""
    step_seconds_p90: float | None = None
    """90th percentile of the seconds of a step."""
    data_wait_seconds: float | None = None
    """Mean seconds that a step waits for data."""
    communication: MedianTimes | None = None
    """Medians of this attempt's steps (Timeline.medians)."""
    why_untimed: str = "Communication was not timed in this run."
    """The reason why there are none."""


# --- what the model owes ---


def layers(bytes_by_parameter: Mapping[str, int]) -> list[LayerJson]:
    """Return what each layer owes. Weight and bias of a module are one layer; shares sum to 1."""
    by_layer: Counter[str] = Counter()
    for name, num_bytes in bytes_by_parameter.items():
        by_layer[name.rpartition(".")[0] or name] += num_bytes
    total = by_layer.total()
    return [{"name": name, "bytes": size, "share": size / total} for name, size in by_layer.items()]


def buckets(by_index: Mapping[int, Bucket], times: MedianTimes | None, why_untimed: str) -> list[Section]:
    """Return DDP's buckets in their order, with their times."""
    return [
        {
            "index": index,
            "bytes": bucket.num_bytes,
            "num_parameters": len(bucket.parameters),
            **_or_missing(bucket_fields(times, index), why_untimed),
        }
        for index, bucket in sorted(by_index.items())
    ]


# --- what was sent, over all attempts ---


def transport(attempts: Sequence[Attempt], predicted: Sent | Missing, measured: Sent | Missing) -> Section:
    """Return the bytes of all committed steps, by rank."""
    if isinstance(measured, Missing):
        residual = measured
    elif isinstance(predicted, Missing):
        residual = predicted
    else:
        residual = (measured - predicted).bytes_per_rank
    return {
        "predicted_bytes_per_rank": _per_rank(predicted),
        "measured_bytes_per_rank": _per_rank(measured),
        "retransmitted_bytes_per_rank": measured if isinstance(measured, Missing) else _retransmitted(attempts),
        "residual_bytes_per_rank": residual,
    }


def servers(present: Attempt, predicted: Sent | Missing, measured: Sent | Missing) -> Section:
    """Return the bytes that left each server in all committed steps, and the network cards' own view of them."""
    unknown = measured if isinstance(measured, Missing) else None if present.placement.measured else ASSUMED
    cards = present.measured.interfaces if present.measured else ()
    is_read = len(cards) == present.placement.num_servers
    return {
        "predicted_egress_bytes": _per_server(predicted),
        "measured_egress_bytes": unknown or _per_server(measured),
        "counter": unknown or TCP_COUNTER,
        "interface": unknown or ([card.interface for card in cards] if is_read else NO_CARD),
        "residual_fraction": unknown or ([card.residual_fraction for card in cards] if is_read else NO_CARD),
    }


def closed(attempts: Sequence[Attempt], predicted: Sent | Missing, measured: Sent | Missing) -> bool | Missing:
    """Tell whether everything that was compared agrees; Missing if the present attempt has compared nothing."""
    answers = [attempt.measured.closed for attempt in attempts if attempt.measured]
    if attempts[-1].measured and any(answer is False for answer in answers):
        return False
    if attempts[-1].measured and all(answers):
        return True
    reasons = [value.reason for value in (measured, predicted) if isinstance(value, Missing)]
    return Missing(next(filter(None, reasons), "No comparison of the ranks is on record."))


def attempt_section(attempt: Attempt, *, is_running: bool, why_unmeasured: str) -> Section:
    """Return what an attempt did.

    Args:
        attempt: One start of the run.
        is_running: Whether it is the present one.
        why_unmeasured: Why the present one measured nothing, if so.
    """
    why = why_unmeasured if is_running else "This attempt ended before its ranks could compare their counts."
    return {
        "attempt": attempt.number,
        "first_step": attempt.first_step,
        "lost_payload_bytes": attempt.lost_payload_bytes(is_running=is_running),
        "measured": known(attempt.measured and attempt.measured.to_json(), why),
    }


def _per_rank(sent: Sent | Missing) -> object:
    return sent if isinstance(sent, Missing) else sent.bytes_per_rank


def _per_server(sent: Sent | Missing) -> object:
    return sent if isinstance(sent, Missing) else sent.egress_per_server


def _retransmitted(attempts: Sequence[Attempt]) -> list[int]:
    """Add up all phases of all attempts with the present number of ranks."""
    lists = [attempt.measured.retransmitted_bytes_per_rank for attempt in attempts if attempt.measured]
    same = [values for values in lists if len(values) == attempts[-1].placement.world_size]
    return [sum(column) for column in zip(*same, strict=True)]


# --- the last step ---


def per_step(last: StepTraffic | None, calls: Counter[Call] | None, predicted: Sent | Missing) -> Section:
    """Return what the last committed step exchanged.

    Args:
        last: Its traffic; None before the first.
        calls: Its collectives; None where they were not counted.
        predicted: Of all steps; where it is missing, so is the step's, for the same reason.
    """
    if last is None:
        return dict.fromkeys(("payload_bytes", "transport_bytes_per_rank", "server_egress_bytes", "calls"), NO_STEP)
    why = predicted.reason if isinstance(predicted, Missing) else "A collective of the last step has no exact formula."
    return {
        "payload_bytes": known(last.payload_bytes, METER_OFF),
        "transport_bytes_per_rank": known(last.transport_bytes_per_rank, why),
        "server_egress_bytes": known(last.server_egress_bytes, why),
        "calls": known(None if calls is None else _calls(calls), METER_OFF),
    }


def _calls(step: Counter[Call]) -> list[CallJson]:
    """Return every collective of one step as rank 0 issued it: all that a wire formula needs, for any ranks."""
    return [
        {
            "op": call.op,
            "origin": call.origin,
            "payload_bytes": call.payload_bytes,
            "itemsize": call.itemsize,
            "root": call.root,
            "num_calls": count,
        }
        for call, count in sorted(step.items())
    ]


def time(conditions: Conditions, why_untimed: str) -> Section:
    """Return the times of a step."""
    return {
        "step_seconds": {
            "p50": known(conditions.step_seconds_p50, NO_TIME),
            "p90": known(conditions.step_seconds_p90, NO_TIME),
        },
        "data_wait_seconds": known(conditions.data_wait_seconds, NO_TIME),
        **_or_missing(time_fields(conditions.communication), why_untimed),
    }


def _or_missing(fields: Mapping[str, float | None], reason: str) -> Section:
    return {name: known(value, reason) for name, value in fields.items()}
