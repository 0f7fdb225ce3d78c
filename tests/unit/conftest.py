"""Fixtures that several rooms share."""

from tests.making.runs import make_run

__all__ = ["make_run"]
