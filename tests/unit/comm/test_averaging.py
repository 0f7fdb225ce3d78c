"""What an attempt makes of a fragment that another plan had under way, and which models cannot be cut."""

import pytest
import torch
from torch import nn

from pipeline.comm.averaging import Averaging
from pipeline.comm.rounds import plan_rounds
from pipeline.config.comm import CommConfig
from pipeline.core.errors import ConfigError

BUCKET = 0.00002  # MiB: a tensor in each


def network(weight: float) -> nn.Module:
    model = nn.Linear(3, 2)
    for parameter in model.parameters():
        nn.init.constant_(parameter, weight)
    return model


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_what_the_plan_does_not_have_under_way_arrives_at_once(codec: str) -> None:
    """Weights in common were 1, their mean is 3/4, the rank left with 1/2 and has 5/8 now."""
    model = network(1.0)
    comm = CommConfig(period=4, outer_lr=0.5, outer_momentum=0.5, bucket_megabytes=BUCKET)
    averaging = Averaging(model, comm)
    averaging.begin()
    nn.init.constant_(next(model.parameters()), 0.625)
    values = torch.full((6,), 0.75 if codec == "fp32" else 0.25)  # a mean, or a mean change
    under_way = {"parameters": [0, 1], "codec": codec, "has_turned": False, "values": values}
    saved = {"momentum": torch.full((8,), 0.5), "under_way": under_way}
    assert averaging.load(saved, {"left_with": torch.full((6,), 0.5)}, plan_rounds(9, lambda _: 4), 5)
    # v = 0.5 * 0.5 + 0.25 = 0.5; in common: 1 - 0.5 * (0.25 + 0.5 * 0.5) = 0.75
    assert averaging.anchor["weight"].eq(0.75).all() and averaging.anchor["bias"].eq(1).all()
    weight, bias = (one.detach() for one in model.parameters())
    assert weight.eq(0.75 + 0.125).all() and bias.eq(1).all()
    assert averaging.momentum is not None and averaging.momentum.tolist() == [0.5] * 8


def test_a_plan_that_has_something_under_way_is_told_that_nothing_is() -> None:
    averaging = Averaging(network(1.0), CommConfig(period=4, delay=2))
    averaging.begin()
    rounds = plan_rounds(9, lambda _: 4, delay=2)
    assert not averaging.load({}, {}, rounds, 5) and averaging.load({}, {}, rounds, 6)


def test_more_fragments_than_buckets_are_refused() -> None:
    Averaging(network(1.0), CommConfig(period=4, fragments=2, bucket_megabytes=BUCKET))
    with pytest.raises(ConfigError, match=r"comm\.fragments=3, but the weights travel in 2 buckets.*at most 2"):
        Averaging(network(1.0), CommConfig(period=4, fragments=3, bucket_megabytes=BUCKET))


def test_weights_that_are_not_fp32_are_refused_with_a_codec() -> None:
    with pytest.raises(ConfigError, match=r"comm\.codec=int4 encodes weights of float32.*float64.*comm\.codec=fp32"):
        Averaging(network(1.0).double(), CommConfig(period=4, codec="int4"))
