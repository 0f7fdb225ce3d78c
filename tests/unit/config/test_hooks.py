"""The one table of compressions, and those that DDP can be given."""

from pipeline.comm import hooks
from pipeline.config.hooks import COMPRESSIONS, HOOKS, ITEMSIZES


def test_every_compression_has_its_hook() -> None:
    assert {*hooks.HOOKS, "powersgd"} == set(HOOKS)  # which has a state, and so is no function


def test_shares_follow_from_the_size_of_an_element() -> None:
    assert {name: compression.share for name, compression in COMPRESSIONS.items()} == {
        "none": 1.0,
        "fp16": 0.5,
        "bf16": 0.5,
        "powersgd": None,
    }
    assert ITEMSIZES == {"none": 4, "fp16": 2, "bf16": 2}
