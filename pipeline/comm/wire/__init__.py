"""Bytes of a collective on the wire, by transport and algorithm: pure functions."""
