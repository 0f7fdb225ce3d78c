"""Every start of a run, and what changed between them."""

from pipeline.core.units import format_count
from pipeline.reporting.runs import RunRecord
from pipeline.reporting.tables import Column, Row, Table, make_table


def attempts_table(run: RunRecord) -> Table | None:
    """Show the starts of a run; None for a run of a version that did not record them."""
    if not run.attempts:
        return None
    columns = (
        Column("attempt", "attempt"),
        Column("started", "started"),
        Column("host", "on"),
        Column("world_size", "ranks", format_count),
        Column("steps", "steps", note="that stand: what an attempt did after its last checkpoint is done again"),
        Column("changed", "changed", note="settings, packages and ranks that differ from the attempt before"),
    )
    ends = [attempt.get("start_step") for attempt in run.attempts[1:]] + [run.ledger["num_steps"]]
    rows: list[Row] = []
    for number, (attempt, end) in enumerate(zip(run.attempts, ends, strict=True), start=1):
        begin = attempt.get("start_step")
        rows.append(
            {
                "attempt": attempt.get("attempt", number),
                "started": str(attempt.get("started", "")).replace("T", " ").removesuffix("+00:00"),
                "host": attempt.get("host"),
                "world_size": attempt.get("world_size"),
                "steps": None if begin is None or end is None else f"{begin:,} to {end:,}",
                "changed": "; ".join(attempt.get("changed") or ["nothing"] if number > 1 else ["the first"]),
            }
        )
    return make_table("", columns, rows)
