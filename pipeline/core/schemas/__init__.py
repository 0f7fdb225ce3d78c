"""The JSON files that runs leave and other rooms read, typed: they are contracts, and `docs/` lists them from here.

Each field carries its meaning and unit in the string below it. A value that was not measured is null, never 0; where a
file has `null_reasons`, the reason stands there under the value's dotted path (`core.missing`).
"""
