"""The `transport`, `servers` and `attempts` parts of ledger.json: predicted beside measured, and why a null is null."""

from collections.abc import Sequence
from typing import Any

from pipeline.comm.ledger.attempts import METER_OFF, Attempt, predicted_totals
from pipeline.comm.ledger.reconcile import Row

WORLD_OF_ONE = "A world of one exchanges nothing."
ASSUMED = (
    "Each rank is taken as a server of its own (placement: assumed), so nothing leaves a server that could be read."
)
TCP_COUNTER = "TCP_INFO of the job's connections to other servers: bytes handed to TCP, each once"
SUM_KEYS = ("measured_bytes_per_rank", "measured_egress_bytes")


def transport_and_servers(
    attempts: Sequence[Attempt], num_steps: int, why_unmeasured: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """({"closed", "transport", "servers"}, null reasons) of all attempts, the present one last.

    Totals are of the committed training steps. why_unmeasured: why the present attempt measured nothing, if so.
    """
    predicted, egress, reason = predicted_totals(attempts)
    reasons: dict[str, str] = {}
    if reason is not None:
        reasons["transport.predicted_bytes_per_rank"] = reasons["servers.predicted_egress_bytes"] = reason
    measured, why = _measured_totals(attempts, num_steps, why_unmeasured)
    present = attempts[-1]
    per_rank, left = (None, None) if measured is None else measured
    residual = None
    if per_rank is None:
        reasons["transport.measured_bytes_per_rank"] = why
    if per_rank is not None and predicted is not None:
        residual = [a - b for a, b in zip(per_rank, predicted, strict=True)]
    else:
        reasons["transport.residual_bytes_per_rank"] = why if per_rank is None else reason or ""
    retransmitted = _retransmitted(attempts) if per_rank is not None else None
    if retransmitted is None:
        reasons["transport.retransmitted_bytes_per_rank"] = why
    transport = {
        "predicted_bytes_per_rank": predicted,
        "measured_bytes_per_rank": per_rank,
        "retransmitted_bytes_per_rank": retransmitted,
        "residual_bytes_per_rank": residual,
    }
    servers = {"predicted_egress_bytes": egress, **_servers(present, left, why, reasons)}
    closed = _closed(attempts)
    if closed is None:
        reasons["closed"] = why or reason or "No comparison of the ranks is on record."
    return {"closed": closed, "transport": transport, "servers": servers}, reasons


def attempt_rows(attempts: Sequence[Attempt], why_unmeasured: str) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """(`attempts` of ledger.json, null reasons)."""
    rows, reasons = [], {}
    for index, attempt in enumerate(attempts):
        running = index == len(attempts) - 1
        lost = attempt.lost_payload_bytes()
        if lost is None:
            reasons[f"attempts.{index}.lost_payload_bytes"] = _why_unknown(attempt, running)
        if attempt.measured is None:
            killed = "This attempt ended before its ranks could compare their counts."
            reasons[f"attempts.{index}.measured"] = why_unmeasured if running else killed
        rows.append(
            {
                "attempt": attempt.number,
                "first_step": attempt.first_step,
                "lost_payload_bytes": lost,
                "measured": None if attempt.measured is None else attempt.measured.to_json(),
            }
        )
    return rows, reasons


def _measured_totals(
    attempts: Sequence[Attempt], num_steps: int, why_unmeasured: str
) -> tuple[tuple[list[int], list[int]] | None, str]:
    """((bytes per rank, bytes out of each server) of the committed steps, "") or (None, why)."""
    present = attempts[-1]
    if present.measured is None:
        return None, why_unmeasured
    if present.measured.num_steps != num_steps:
        return None, f"The ranks last compared their counts after step {present.measured.num_steps}: see attempts."
    worked = [attempt for attempt in attempts if attempt.committed]
    if any(attempt.measured is None for attempt in worked):
        return None, "An earlier attempt was not measured."
    if len({attempt.placement.server_of_rank for attempt in worked}) > 1:
        return None, "Attempts of this run had different ranks or servers; their bytes cannot be added by rank."
    placement = present.placement
    totals = ([0] * placement.world_size, [0] * placement.num_servers)
    for attempt in worked:
        row: Row | None = attempt.measured.row("train", True) if attempt.measured else None
        for total, name in zip(totals, SUM_KEYS, strict=True):
            for index, value in enumerate(getattr(row, name) if row else ()):
                total[index] += value
    return totals, ""


def _retransmitted(attempts: Sequence[Attempt]) -> list[int] | None:
    """Of all attempts with the present ranks, in all phases."""
    lists = [attempt.measured.retransmitted_bytes_per_rank for attempt in attempts if attempt.measured]
    same = [values for values in lists if len(values) == attempts[-1].placement.world_size]
    return [sum(column) for column in zip(*same, strict=True)] if same else None


def _servers(present: Attempt, egress: list[int] | None, why: str, reasons: dict[str, str]) -> dict[str, Any]:
    """Measured egress, and the network cards' own view of it."""
    values: dict[str, Any] = dict.fromkeys(("measured_egress_bytes", "counter", "interface", "residual_fraction"))
    if egress is None or not present.placement.measured:
        reasons.update({f"servers.{name}": why if egress is None else ASSUMED for name in values})
        return values
    values |= {"measured_egress_bytes": egress, "counter": TCP_COUNTER}
    cards = present.measured.interfaces if present.measured else []
    if len(cards) == present.placement.num_servers:
        values["interface"] = [card.interface for card in cards]
        values["residual_fraction"] = [card.residual_fraction for card in cards]
    else:
        no_card = "The network card that carries the job could not be read on every server (none in this container?)."
        reasons["servers.interface"] = reasons["servers.residual_fraction"] = no_card
    return values


def _closed(attempts: Sequence[Attempt]) -> bool | None:
    """Whether everything that was compared agrees; None if the present attempt has compared nothing."""
    if attempts[-1].measured is None:
        return None
    answers = [attempt.measured.closed for attempt in attempts if attempt.measured]
    if False in answers:
        return False
    return None if None in answers else True


def _why_unknown(attempt: Attempt, running: bool) -> str:
    """Why the lost work of `attempt` is not known."""
    if not attempt.metered:
        return METER_OFF
    if running:
        return "This attempt is still running."
    return "This attempt ended without a last word; what it issued after it last wrote is not known."
