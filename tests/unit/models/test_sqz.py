"""The over-the-air package: what goes in comes out, in any language, and what was damaged is refused."""

import bisect
import hashlib
import json
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.models.sqz import decoder
from pipeline.models.sqz.decoder import Package, PackageError, decode
from pipeline.models.sqz.delta import WrongBaseError, apply_delta, make_delta
from pipeline.models.sqz.encoder import encode, make_grid, pack

GOLDEN = "f6b8e12123020470"
META = {"model": "squeezenet1_0", "classes": ["ant", "bee"]}


def package_of(symbols: dict[str, np.ndarray], grids: dict[str, decoder.Grid] | None = None) -> Package:
    grids = grids or {name: make_grid(values, 0.013) for name, values in symbols.items()}
    plain = {"bias": np.array([0.5, -2], np.float16), "count": np.array(7, np.int64)}
    return pack(META, {**symbols, **plain}, grids, [(1, 2.5), (0, -1.25)])


def pruned(seed: int, shape: tuple[int, ...] = (24, 16, 3, 3)) -> np.ndarray:
    """Symbols as a pruned layer has them: two thirds 0, the others Laplacian."""
    generator = np.random.default_rng(seed)
    return np.rint(generator.laplace(size=shape) * 9 * (generator.random(shape) < 0.33)).astype(np.int32)


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 5), min_size=0, max_size=3), st.integers(0, 2**32 - 1), st.integers(0, 400)),
        min_size=1,
        max_size=4,
    )
)
@settings(max_examples=60, deadline=None)
def test_what_is_packed_is_unpacked(layers: list[tuple[list[int], int, int]]) -> None:
    symbols = {
        f"layer{number}": np.random.default_rng(seed).integers(-width, width + 1, shape).astype(np.int32)
        for number, (shape, seed, width) in enumerate(layers)
    }
    made = encode(package_of(symbols))
    assert sum(made.bytes_by_part.values()) == len(made.content)
    found = decode(made.content)
    assert found.meta["classes"] == META["classes"] and found.self_test.tolist() == [(1, 2.5), (0, -1.25)]
    tensors = found.tensors()
    assert list(tensors) == [*symbols, "bias", "count"] and int(tensors["count"]) == 7
    for name, values in symbols.items():
        assert np.array_equal(found.symbols[name], values)
        assert np.array_equal(tensors[name], values.astype(np.float32) * np.float32(0.013))
    assert encode(found).content == made.content


def test_its_size_is_the_entropy_and_little_more() -> None:
    symbols = {str(number): pruned(number, (256, 400)) for number in range(4)}
    num_bits = 0.0
    for values in symbols.values():
        _, counts = np.unique(values, return_counts=True)
        num_bits += float(-(counts * np.log2(counts / values.size)).sum())
    assert num_bits / 8 < len(encode(package_of(symbols)).content) < 1.005 * num_bits / 8 + 900


def decoded_from_the_page(content: bytes) -> dict[str, list[int]]:
    """A decoder written from docs/package.md, in integers alone."""
    lengths = struct.unpack_from("<4I", content, 68)
    at = [84]
    for length in lengths:
        at.append(at[-1] + length)
    description = json.loads(zlib.decompress(content[at[0] : at[1]]))
    tables, place = zlib.decompress(content[at[1] : at[2]]), 0
    words = [int.from_bytes(content[i : i + 4], "little") for i in range(at[4], len(content), 4)] + [0, 0]
    mask = (1 << 64) - 1
    low, extent, point, following = 0, mask, words[0] << 32 | words[1], 2
    found: dict[str, list[int]] = {}
    for name, shape, kind in description["tensors"]:
        if kind != "coded":
            continue
        _, lowest, num_codes = struct.unpack_from("<fiI", tables, place)
        codes = tables[place + 12 : place + 12 + num_codes]
        place += 12 + num_codes
        frequencies = [(8 + code % 8) * 2 ** (code // 8) for code in codes]
        room = 2**24 - num_codes
        weights = [frequency * room // sum(frequencies) + 1 for frequency in frequencies]
        weights[frequencies.index(max(frequencies))] += 2**24 - sum(weights)
        if num_codes == 1:
            found[name] = [lowest] * int(np.prod(shape))
            continue
        before = [sum(weights[:number]) for number in range(num_codes)]
        found[name] = []
        for _ in range(int(np.prod(shape))):
            scale = extent >> 24
            quantile = ((point - low) & mask) // scale
            number = bisect.bisect_right(before, quantile) - 1
            low, extent = (low + scale * before[number]) & mask, scale * weights[number]
            if extent < 1 << 32:
                low, extent = low << 32 & mask, extent << 32
                point = (point << 32 | (words[following] if following < len(words) else 0)) & mask
                following += 1
            found[name].append(lowest + number)
    return found


def test_a_decoder_written_from_the_page_reads_it() -> None:
    symbols = {"a": pruned(1), "b": np.zeros((3, 3), np.int32), "c": pruned(2, (7, 50))}
    found = decoded_from_the_page(encode(package_of(symbols)).content)
    assert {name: values.ravel().tolist() for name, values in symbols.items()} == found


def test_the_format_stays_as_it_is() -> None:
    """Devices in the field hold decoders of this schema: the bytes of a package may not change under it."""
    content = encode(package_of({"a": np.arange(-4, 5, dtype=np.int32).repeat([1, 2, 4, 8, 20, 8, 4, 2, 1])})).content
    assert decode(content).symbols["a"].tolist() == np.arange(-4, 5).repeat([1, 2, 4, 8, 20, 8, 4, 2, 1]).tolist()
    assert hashlib.sha256(content[84 + struct.unpack_from("<I", content, 68)[0] :]).hexdigest()[:16] == GOLDEN


def test_the_reference_decoder_needs_a_hundred_lines_and_nothing_of_ours() -> None:
    source = Path(decoder.__file__).read_text()
    assert len(source.splitlines()) <= 100
    assert "pipeline" not in source.replace("pipeline/", "") and "torch" not in source


@pytest.mark.parametrize("what", ["package", "delta"])
def test_damage_is_refused(what: str) -> None:
    """Flipped bits, cuts, swapped heads, added bytes: ten thousand of each kind of file."""
    older = package_of({"a": pruned(3, (8, 60))})
    base = encode(older).content
    new = encode(
        package_of({"a": np.clip(older.symbols["a"] + 1, None, older.symbols["a"].max())}, older.grids)
    ).content
    sound, other = (new, base) if what == "package" else (make_delta(base, new), make_delta(base, base))
    read = decode if what == "package" else lambda content: apply_delta(base, content)  # type: ignore[assignment]
    read(sound)
    generator = random.Random(0)
    for number in range(10_000):
        damaged = bytearray(sound)
        kind = number % 4
        if kind == 0:
            for _ in range(generator.randint(1, 8)):
                damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
        elif kind == 1:
            del damaged[generator.randrange(len(damaged)) :]
        elif kind == 2:
            end = generator.randrange(5, 152)
            damaged[4:end] = other[4:end]
        else:
            damaged += generator.randbytes(generator.randint(1, 40))
        if bytes(damaged) == sound or (kind == 2 and bytes(damaged) == other):
            continue
        with pytest.raises(PackageError):
            read(bytes(damaged))


def resealed(content: bytes) -> bytes:
    """The same file with the right hash over it: what somebody who means harm would send."""
    return content[:4] + hashlib.sha256(content[36:]).digest() + content[36:]


@pytest.mark.parametrize(
    ("shape", "words"),
    [([1 << 20, 1 << 20], "memory"), ([-1, 4], "impossible"), ([1 << 40], "memory")],
)
def test_a_description_made_to_harm_costs_nothing(shape: list[int], words: str) -> None:
    content = encode(package_of({"a": pruned(4)})).content
    lengths = struct.unpack_from("<4I", content, 68)
    description = json.loads(zlib.decompress(content[84 : 84 + lengths[0]]))
    description["tensors"][0][1] = shape
    part = zlib.compress(json.dumps(description).encode())
    harmful = content[:68] + struct.pack("<I", len(part)) + content[72:84] + part + content[84 + lengths[0] :]
    with pytest.raises(PackageError, match=words):
        decode(resealed(harmful))
    bomb = zlib.compress(bytes(1 << 26), 9)
    harmful = content[:68] + struct.pack("<I", len(bomb)) + content[72:84] + bomb + content[84 + lengths[0] :]
    with pytest.raises(PackageError, match="too large"):
        decode(resealed(harmful))


@given(st.integers(0, 2**32 - 1), st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_a_delta_gives_the_newer_file_byte_for_byte(seed: int, share: float) -> None:
    generator = np.random.default_rng(seed)
    symbols = {"a": pruned(seed % 1000), "b": pruned(seed % 999, (5, 40)), "same": pruned(5)}
    older = package_of(symbols)
    newer = {
        name: np.clip(
            values
            + (generator.random(values.shape) < share) * generator.integers(-2, 3, values.shape) * (name != "same"),
            values.min(),
            values.max(),
        )
        for name, values in symbols.items()
    }
    base, new = encode(older).content, encode(package_of(newer, older.grids)).content
    delta = make_delta(base, new)
    assert apply_delta(base, delta) == new
    with pytest.raises(WrongBaseError):
        apply_delta(encode(package_of({**symbols, "a": pruned(6)})).content, delta)


def test_little_changed_costs_little() -> None:
    symbols = {"a": pruned(7, (128, 500))}
    older = package_of(symbols)
    base = encode(older).content
    assert len(make_delta(base, base)) < 400
    values = symbols["a"].copy()
    values[0, :20] += values[0, :20] != 0
    new = encode(package_of({"a": values.clip(values.min(), symbols["a"].max())}, older.grids)).content
    assert len(make_delta(base, new)) < 600 < len(new) / 20


def test_deltas_between_what_does_not_go_together_are_refused() -> None:
    base = encode(package_of({"a": pruned(8)})).content
    with pytest.raises(PackageError, match="other tensors"):
        make_delta(base, encode(package_of({"b": pruned(8)})).content)
    coarser = {"a": make_grid(pruned(8), 0.5)}
    with pytest.raises(PackageError, match="different grids"):
        make_delta(base, encode(package_of({"a": pruned(8)}, coarser)).content)
