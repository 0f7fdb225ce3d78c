"""The one table of gradient compressions (`comm.hook`): what each is called and what it sends."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Compression:
    """What one value of `comm.hook` does to gradients on the wire."""

    itemsize: int | None
    """Bytes of a gradient's element on the wire, of 4 in memory; None: it depends on the layers' shapes."""
    words: str
    """The compression as a clause after the word "gradients"."""

    @property
    def share(self) -> float | None:
        """Bytes sent over bytes owed; None where it depends on the layers' shapes."""
        return None if self.itemsize is None else self.itemsize / 4


COMPRESSIONS = {
    "none": Compression(4, "uncompressed"),
    "fp16": Compression(2, "sent as fp16"),
    "bf16": Compression(2, "sent as bf16"),
    "powersgd": Compression(None, "compressed by powersgd"),
}
HOOKS = tuple(COMPRESSIONS)
ITEMSIZES = {name: one.itemsize for name, one in COMPRESSIONS.items() if one.itemsize is not None}
"""Bytes of a gradient's element on the wire, of the hooks whose bytes follow from the plain ones: those forecast."""
