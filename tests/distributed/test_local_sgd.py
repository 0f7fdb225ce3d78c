"""The algebra of averaged weights, in float64, on 2 and 3 real ranks."""

from pathlib import Path

import pytest

from tests.distributed.meter_ranks import run_ranks

SHORT, LONG = 40, 200  # steps


@pytest.mark.parametrize(
    ("num_ranks", "num_steps"),
    [(2, SHORT), (3, SHORT), *(pytest.param(ranks, LONG, marks=pytest.mark.slow) for ranks in (2, 3, 4))],
)
def test_averaged_weights(num_ranks: int, num_steps: int, tmp_path: Path) -> None:
    ranks = run_ranks("local_rank.py", num_ranks, tmp_path, str(num_steps))
    for told in ranks:
        apart = told["rounds_of_one"]
        clipped = apart.pop("clipped")
        assert len(apart) == 3 and max(apart.values()) < 1e-12
        assert clipped > 1e-3  # the norm of a mean is not the mean of norms
        # Halves and quarters add up exactly, thirds do not; two numbers in either order, three do not.
        assert told["same_pictures"]["apart"] <= (1e-12 if num_ranks == 3 else 0.0)
        assert told["as_one_process"]["apart"] <= (0.0 if num_ranks == 2 else 1e-12)
        assert told["anchored"] == {"has_anchor": True, "apart": 0.0}
        for name, found in told["outer_steps"].items():
            # Two numbers add up in either order; by a codec, ranks add up in theirs, and equal the reference too.
            is_exact = num_ranks == 2 or name.startswith(("bf16", "int"))
            assert found["apart"] <= (0.0 if is_exact else 1e-5), name
            assert found["sum"] == ranks[0]["outer_steps"][name]["sum"], name
        assert told["layout"]["stays"] and told["layout"]["kept"]
        means = [sum(values) / num_ranks for values in zip(*(one["layout"]["before"] for one in ranks), strict=True)]
        assert told["layout"]["after"] == pytest.approx(means, rel=1e-4, abs=1e-5)
        assert told["layout"]["before"] != told["layout"]["after"] == ranks[0]["layout"]["after"]
        assert told["as_one_process"]["sum"] == ranks[0]["as_one_process"]["sum"]
