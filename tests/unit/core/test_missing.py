"""Reasons stand where values would; the border turns them into nulls."""

import json

from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.missing import Missing, to_json

leaves = st.none() | st.booleans() | st.integers() | st.text(max_size=5)
keys = st.text("abc", min_size=1, max_size=3)
trees = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3))


def test_a_reason_becomes_a_null_and_a_path() -> None:
    tree = {"time": {"p50": 1.5, "p90": Missing("too few")}, "points": ({"seconds": Missing("alone")},), "name": "x"}
    nulls, reasons = to_json(tree)
    assert nulls == {"time": {"p50": 1.5, "p90": None}, "points": [{"seconds": None}], "name": "x"}
    assert reasons == {"time.p90": "too few", "points.0.seconds": "alone"}


def test_a_whole_branch_may_be_missing() -> None:
    assert to_json({"servers": Missing("assumed")}) == ({"servers": None}, {"servers": "assumed"})


@given(trees)
def test_what_is_known_stays_as_it_is(tree: object) -> None:
    assert to_json(tree) == (json.loads(json.dumps(tree)), {})
