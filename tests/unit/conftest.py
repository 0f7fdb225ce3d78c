"""Fixtures that several rooms share."""

from tests.handmade_runs import make_run

__all__ = ["make_run"]
