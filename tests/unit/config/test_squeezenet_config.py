"""SqueezeNet's metaparameters: what is refused, and the widths that the paper's formulas give."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.squeezenet import SqueezeNetConfig
from pipeline.core.errors import ConfigError


@given(
    base_e=st.integers(8, 200),
    incr_e=st.integers(0, 200),
    freq=st.integers(1, 9),
    pct3x3=st.floats(0.1, 0.9),
    sr=st.floats(0.1, 1.0),
    i=st.integers(0, 7),
)
def test_fire_widths_follow_the_papers_formulas(
    base_e: int, incr_e: int, freq: int, pct3x3: float, sr: float, i: int
) -> None:
    config = SqueezeNetConfig(base_e=base_e, incr_e=incr_e, freq=freq, pct3x3=pct3x3, sr=sr)
    widths = config.fire_widths(i + 2)
    e = base_e + incr_e * math.floor(i / freq)
    assert widths.e == e
    assert abs(widths.e3x3 - pct3x3 * e) <= 0.5
    assert abs(widths.s1x1 - sr * e) <= 0.5


@pytest.mark.parametrize(
    ("metaparameters", "says"),
    [
        ({"sr": 0}, "sr=0 must be a ratio"),
        ({"sr": "half"}, "sr='half' must be a ratio"),
        ({"sr": 0.001}, "raise sr"),
        ({"pct3x3": 1.0}, "pct3x3=1.0 must be a share"),
        ({"pct3x3": 0.001}, "raise base_e or pct3x3"),
        ({"base_e": 128.0}, "base_e=128.0 must be a whole number"),
        ({"freq": 0}, "freq=0 must be a whole number"),
        ({"incr_e": -1}, "incr_e=-1"),
        ({"bypass": "simpel"}, "Did you mean 'simple'"),
        ({"bypass": "simple", "freq": 1}, "bypass nothing"),
        ({"pool_after": [1, 10]}, "layers from 1 to 9"),
        ({"pool_after": [1, 1]}, "each once"),
        ({"pool_after": "1"}, "layers from 1 to 9"),
        ({"pool_after": 4}, "layers from 1 to 9"),
        ({"stem": "v1.2"}, "Did you mean 'v1.1'|Did you mean 'v1.0'"),
        ({"init": "xavier"}, "torchvision, caffe"),
        ({"dropout": 1}, "dropout=1 must be a share"),
        ({"final_relu": 0}, "final_relu=0 must be true or false"),
        ({"conv10_pad": -1}, "conv10_pad=-1"),
    ],
)
def test_impossible_metaparameters_are_refused_with_the_rule(metaparameters: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        SqueezeNetConfig(**metaparameters)
