"""Shards: writing them (sources, builtin, writer), and reading them in a global order that is a pure function."""
