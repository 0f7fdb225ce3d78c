"""How many samples may be bad."""

import math
from fractions import Fraction


def allowed_bad(max_bad_fraction: float, num_samples: int) -> int:
    """The most samples of `num_samples` that a share of `max_bad_fraction` allows.

    Reckoned with the decimal number that was written, not with its nearest binary one: 0.29 of 100 are 29.
    """
    return math.floor(Fraction(repr(max_bad_fraction)) * num_samples)
