"""Tables as data: built once from plain rows, printed by rich, set in HTML by the page."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.core.schemas.lab import LabJson
from pipeline.core.schemas.ledger import LedgerJson
from pipeline.core.text import printable
from pipeline.core.units import MISSING, format_bytes, format_count

if TYPE_CHECKING:
    from rich.table import Table as RichTable

Row = Mapping[str, object]
"""A row of a table: values by the keys of its columns."""
R = TypeVar("R", bound=Row)
LOST = "train, lost"  # the phase of training that no committed step owns


@dataclass(frozen=True)
class Column:
    """A column: which key of a row, under which heading, printed how."""

    key: str
    title: str
    show: Callable[[Any], str] | None = None
    """Formats a number, which is then set to the right; None: text, as it is."""
    note: str = ""
    """What the heading means; shown on the page below the table."""
    short: str | None = None
    """Heading in the terminal, where 80 columns must do; empty: the column is left out there."""

    @property
    def numeric(self) -> bool:
        """Whether the column holds numbers."""
        return self.show is not None

    def text(self, value: object) -> str:
        """Return the cell as printed."""
        if self.show is not None:
            return self.show(value)
        return MISSING if value is None or value == "" else str(value)


@dataclass(frozen=True)
class Cell:
    """A cell: as printed, and the exact value it is sorted by (None last)."""

    text: str
    value: object


@dataclass(frozen=True)
class TableRow:
    """A row of cells; `mark` is a style class (`baseline`, `failed`, `open`), `reason` spans the row's empty cells."""

    cells: tuple[Cell, ...]
    mark: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Table:
    """A table ready to be rendered."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[TableRow, ...]
    caption: str = ""
    """Line below the table in the terminal."""

    @property
    def notes(self) -> list[tuple[str, str]]:
        """Heading and meaning of the columns that need words."""
        return [(column.title, column.note) for column in self.columns if column.note]

    def to_rich(self) -> "RichTable":
        """Return the table for the terminal."""
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(
            title=self.title or None,
            box=box.SIMPLE_HEAD,
            title_justify="left",
            title_style="bold",
            caption=self.caption or None,
            caption_justify="left",
            padding=(0, 1, 0, 0),
        )
        shown = [column.short != "" for column in self.columns]
        for column in itertools.compress(self.columns, shown):
            title = column.title if column.short is None else column.short
            # A long name is folded where the terminal is narrow; numbers stay whole.
            justify = "right" if column.numeric else "left"
            table.add_column(title, justify=justify, no_wrap=column.numeric, overflow="fold")
        styles = {"baseline": "bold", "failed": "red", "open": "yellow"}
        for row in self.rows:
            # Text, not str: a name in square brackets is no markup.
            cells = [Text(printable(cell.text)) for cell in itertools.compress(row.cells, shown)]
            table.add_row(*cells, style=styles.get(row.mark))
        return table


def make_table(
    title: str, columns: Sequence[Column], rows: Iterable[R], mark: Callable[[R], str] | None = None
) -> Table:
    """Format rows. A row with a `reason` failed: it shows its first cell and the reason.

    Args:
        title: Words above the table; empty: none.
        columns: Columns from the left.
        rows: Rows from the top.
        mark: Returns a row's style class, see `TableRow`.
    """
    made = []
    for row in rows:
        cells = tuple(Cell(column.text(row.get(column.key)), row.get(column.key)) for column in columns)
        made.append(TableRow(cells, mark(row) if mark else "", str(row.get("reason") or "")))
    return Table(title, tuple(columns), tuple(made))


def collectives_table(ledger: LedgerJson) -> Table:
    """Show what a run issued, by operation, origin and phase; attempts are shown only if there were several.

    Training of steps that were lost to a kill and done again stands apart.
    """
    rows = ledger["collectives"]
    columns = [
        Column("phase", "phase"),
        Column("origin", "origin"),
        Column("op", "operation"),
        Column("num_calls", "calls", format_count),
        Column("payload_bytes", "payload of rank 0", format_bytes),
    ]
    if len({row["attempt"] for row in rows}) > 1:
        columns.insert(0, Column("attempt", "attempt", format_count))
    if any("group" in row for row in rows):
        columns.insert(0, Column("group", "group"))
    order = {"train": 0, LOST: 1, "validation": 2, "checkpoint": 3, "startup": 4}
    phases = [(row["phase"] if row.get("committed", True) else LOST, row) for row in rows]
    phases.sort(key=lambda found: (found[1]["attempt"], order.get(found[0], 9), -found[1]["payload_bytes"]))
    return make_table("", columns, [{"group": "all", **row, "phase": phase} for phase, row in phases], _mark_of_phase)


def _mark_of_phase(row: Row) -> str:
    return "" if row["phase"] == "train" else "outside"


def reconciliation_table(ledger: LedgerJson) -> Table:
    """Show predicted beside measured bytes, by attempt and phase, over all ranks; the residual is the worst rank's."""
    rows: list[Row] = []
    for attempt in ledger["attempts"]:
        measured = attempt.get("measured")
        for row in measured["rows"] if measured else ():
            predicted, residual = row["predicted_bytes_per_rank"], row["residual_bytes_per_rank"]
            rows.append(
                {
                    "attempt": attempt["attempt"],
                    "phase": row["phase"] if row["committed"] else LOST,
                    "predicted": None if predicted is None else sum(predicted),
                    "measured": sum(row["measured_bytes_per_rank"]),
                    "residual": None if residual is None else max(residual, key=abs),
                    "egress": max(row["measured_egress_bytes"]) if ledger["placement"] == "measured" else None,
                }
            )
    columns = [
        Column("phase", "phase"),
        Column("predicted", "predicted", _exact, "what the recorded collectives send by gloo's formulas, all ranks"),
        Column("measured", "measured", _exact, "what the kernel counted on the connections between ranks, all ranks"),
        Column("residual", "residual", _exact, "measured minus predicted, of the rank where it is largest"),
    ]
    if len(ledger["attempts"]) > 1:
        columns.insert(0, Column("attempt", "attempt", format_count))
    if any(row["egress"] is not None for row in rows):
        columns.append(Column("egress", "out of a server", _exact, "measured, of the server that sends most"))
    return make_table("", columns, rows, _mark_of_phase)


def cards_table(ledger: LedgerJson) -> Table:
    """Show the servers' network cards beside the connections that use them, in the present attempt."""
    measured = ledger["attempts"][-1].get("measured")
    cards = measured["interfaces"] if measured else []
    unit = {False: "frames", True: "super-packets", None: "unknown"}
    columns = (
        Column("server", "server", format_count),
        Column("interface", "interface"),
        Column("unit", "counts", note="frames of the wire, or what is handed to the card before it is cut into frames"),
        Column("interface_bytes", "card", _exact, "everything the card sent while the run trained"),
        Column("tcp_bytes", "connections", _exact, "data of the ranks and of torch's store, retransmissions included"),
        Column("retransmitted_bytes", "sent again", _exact, "of the connections' bytes, those that TCP sent again"),
        Column("header_bytes", "headers", _exact, "Ethernet, IP and TCP, of every packet"),
        Column(
            "residual_fraction",
            "unexplained",
            lambda share: MISSING if share is None else f"{share:+.4%}",
            "other traffic; where packets are lost or late also selective acknowledgements, which no counter has",
        ),
    )
    return make_table("", columns, [{**card, "unit": unit[card["segmentation_offload"]]} for card in cards])


def buckets_table(ledger: LedgerJson) -> Table:
    """Show DDP's gradient buckets in the order they are reduced."""
    columns = (
        Column("index", "bucket"),
        Column("bytes", "bytes", format_bytes),
        Column("num_parameters", "tensors", format_count),
    )
    return make_table("", columns, ledger.get("buckets") or [])


def _exact(value: int | None) -> str:
    return MISSING if value is None else f"{value:,}"


def lab_table(record: LabJson) -> Table:
    """Show what each server's interface counted. Bytes are exact: they are compared with predictions."""
    counted = "as whole packets before segmentation" if record["offloads"] else "as frames of the wire"
    columns = (
        Column("server", "server"),
        Column("address", "address"),
        Column("ranks", "ranks"),
        Column("tx_bytes", "bytes out", format_count),
        Column("rx_bytes", "bytes in", format_count),
        Column("tx_packets", "packets out", format_count),
    )
    ranks = list(enumerate(record["server_of_rank"]))
    rows = [
        {**row, "ranks": ",".join(str(rank) for rank, server in ranks if server == row["server"])}
        for row in record["interfaces"]
    ]
    return make_table(f"{record['interfaces'][0]['interface']} of each server, counted {counted}", columns, rows)
