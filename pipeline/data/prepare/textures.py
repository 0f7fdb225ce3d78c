"""Ten textures a network must recognise by their structure: colour, phase and scale say nothing.

Every texture is a function from lattice coordinates to a coverage in [0, 1]. `u_HW` grows to the right and `v_HW`
downwards, both in units of one period. No class depends on left and right, so a horizontal flip keeps the label; none
depends on the period, so a random-resized crop keeps it too.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Plane = npt.NDArray[np.floating[Any]]
"""Float32 in fact; numpy's own types do not follow arithmetic that closely."""
Texture = Callable[[Plane, Plane, np.random.Generator], Plane]

EDGE = 12.0
"""Steepness of an edge, coverage per period: soft enough not to ring in JPEG, sharp enough to be seen as an edge."""
TILT_RADIANS = 0.06
"""Textures are tilted by at most this much, so that no pixel row or column is an exact replica of another."""


def draw(name: str, height: int, width: int, rng: np.random.Generator) -> Plane:
    """Coverage `(height, width)` of the texture called `name`, its period, phase and tilt drawn from `rng`."""
    period_pixels = min(height, width) * rng.uniform(1 / 7, 1 / 5)
    tilt = rng.uniform(-TILT_RADIANS, TILT_RADIANS)
    phase_u, phase_v = rng.uniform(0, 64, 2)
    cosine, sine = np.float32(np.cos(tilt) / period_pixels), np.float32(np.sin(tilt) / period_pixels)
    x_1W = np.arange(width, dtype=np.float32)[None, :]
    y_H1 = np.arange(height, dtype=np.float32)[:, None]
    u_HW = x_1W * cosine + (y_H1 * sine + np.float32(phase_u))
    v_HW = y_H1 * cosine - (x_1W * sine - np.float32(phase_v))
    return TEXTURES[name](u_HW, v_HW, rng)


def _edge(signed_distance: Plane, steepness: float = EDGE) -> Plane:
    """Coverage of the region where `signed_distance`, in periods, is positive."""
    return np.clip(signed_distance * np.float32(steepness) + np.float32(0.5), 0, 1)


def _wave(position: Plane) -> Plane:
    """Distance to the nearest integer: a triangle wave between 0 and 1/2."""
    return np.abs(position - np.rint(position))


def _stripes(position: Plane, rng: np.random.Generator) -> Plane:
    return _edge(_wave(position) - np.float32(rng.uniform(0.20, 0.30)))


def _blobs(u_HW: Plane, v_HW: Plane, rng: np.random.Generator) -> Plane:
    """Camouflage: eight plane waves of random directions, added and cut at zero."""
    coarse_u, coarse_v = u_HW[::4, ::4], v_HW[::4, ::4]  # it is smooth, and sines are slow
    total = np.zeros_like(coarse_u)
    for angle, phase in zip(np.arange(8) * (np.pi / 8), rng.uniform(0, 2 * np.pi, 8), strict=True):
        frequency = np.float32(2 * np.pi * rng.uniform(0.4, 0.7))
        direction_u, direction_v = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        total += np.sin((coarse_u * direction_u + coarse_v * direction_v) * frequency + np.float32(phase))
    height, width = u_HW.shape
    return _edge(np.asarray(Image.fromarray(total).resize((width, height), Image.Resampling.BICUBIC)), 1.5)


def _bricks(u_HW: Plane, v_HW: Plane, rng: np.random.Generator) -> Plane:
    """A wall in running bond: joints around bricks twice as wide as high."""
    course = np.floor(v_HW)
    along = u_HW * np.float32(0.5) + np.float32(0.5) * course
    joint = np.minimum(_wave(v_HW), 2 * _wave(along))
    return _edge(joint - np.float32(rng.uniform(0.10, 0.14)))


def _checkerboard(u_HW: Plane, v_HW: Plane, rng: np.random.Generator) -> Plane:
    """Two-coloured squares."""
    quarter = np.float32(0.25)
    a, b = (_edge(_wave(position * 2 * quarter) - quarter, 2 * EDGE) for position in (u_HW, v_HW))
    return a + b - 2 * a * b


def _crosses(u_HW: Plane, v_HW: Plane, rng: np.random.Generator) -> Plane:
    """Separate plus signs on a square lattice."""
    a, b = _wave(u_HW * np.float32(0.7)), _wave(v_HW * np.float32(0.7))
    arm, half_width = np.float32(0.38), np.float32(rng.uniform(0.10, 0.13))
    return _edge(np.maximum(np.minimum(arm - a, half_width - b), np.minimum(arm - b, half_width - a)))


def _diagonals(u_HW: Plane, v_HW: Plane, rng: np.random.Generator) -> Plane:
    """Stripes at 45 degrees, rising or falling (one class, since a flip swaps them)."""
    sign = np.float32(rng.choice((-1.0, 1.0)))
    return _stripes((u_HW + sign * v_HW) * np.float32(0.5**0.5), rng)


def _discs(u_HW: Plane, v_HW: Plane, rng: np.random.Generator) -> Plane:
    """Dots on a square lattice."""
    return _edge(np.float32(rng.uniform(0.28, 0.34)) - np.hypot(_wave(u_HW), _wave(v_HW)))


def _horizontal(u_HW: Plane, v_HW: Plane, rng: np.random.Generator) -> Plane:
    """Horizontal stripes."""
    return _stripes(v_HW, rng)


def _plain(u_HW: Plane, v_HW: Plane, rng: np.random.Generator) -> Plane:
    """No texture at all: what remains is light, clutter and noise."""
    return np.zeros_like(u_HW)


def _ripples(u_HW: Plane, v_HW: Plane, rng: np.random.Generator) -> Plane:
    """Concentric circles around the points of a coarse lattice."""
    cell = np.float32(3.0)
    return _stripes(np.hypot(_wave(u_HW / cell), _wave(v_HW / cell)) * cell, rng)


def _vertical(u_HW: Plane, v_HW: Plane, rng: np.random.Generator) -> Plane:
    """Vertical stripes."""
    return _stripes(u_HW, rng)


TEXTURES: dict[str, Texture] = {
    "blobs": _blobs,
    "bricks": _bricks,
    "checkerboard": _checkerboard,
    "crosses": _crosses,
    "diagonals": _diagonals,
    "discs": _discs,
    "horizontal": _horizontal,
    "plain": _plain,
    "ripples": _ripples,
    "vertical": _vertical,
}
