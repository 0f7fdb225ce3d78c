"""Damage as the world does it, chosen by a seeded generator: to trees of plain values, to bytes, to tars, to arrays."""

import copy
import json
import math
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

Odd = Callable[[Random, Any], Any]
"""A value to put in place of another."""

NUMBERS = (0, 1, -1, 2, 7, 2**31 - 1, 2**31, -(2**31), 2**53 + 1, 2**63, 2**64, 10**30, 1e308, 0.5, -0.0)
TEXTS = (
    "",
    " ",
    "null",
    "0",
    "-1",
    "1e3",
    "../x",
    "/etc/passwd",
    "a/b",
    ".",
    "é",
    "e\u0301",
    "\u202e",
    "\ud800",
    "x\0",
)
TEXTS += ("pipe:true", "${x}", "\x1b[31m", "x" * 300, "train", "val")


def odd_value(random: Random, value: Any) -> Any:
    """Another type, sign, size or form of `value`."""
    if isinstance(value, bool):
        return random.choice([not value, int(value), str(value), None])
    if isinstance(value, int | float) and random.random() < 0.7:
        nearby = (value + 1, value - 1, -value, value * 2, value * 2**32, float(value) if abs(value) < 2**1000 else 1.0)
        return random.choice([*nearby, str(value), math.nan, math.inf, *NUMBERS])
    if isinstance(value, str) and value and random.random() < 0.7:
        place = random.randrange(len(value))
        changed = value[:place] + random.choice("0aZ/.- \n\0é{[\"'") + value[place + random.randrange(2) :]
        return random.choice([changed, value[:place], value * 2, value.upper(), value.swapcase(), f" {value}", [value]])
    return random.choice([None, True, [], {}, [[]], [None], {"": 1}, [value], {"a": value}, *NUMBERS, *TEXTS])


def damage_tree(random: Random, tree: Any, odd: Odd = odd_value, *, times: int | None = None) -> Any:
    """A copy of nested dictionaries and lists with one to three places changed."""
    root = {"": copy.deepcopy(tree)}
    for _ in range(times or random.choice((1, 1, 1, 2, 3))):
        _damage_once(random, root, odd)
    return root.get("")


def _damage_once(random: Random, root: dict[str, Any], odd: Odd) -> None:
    places = list(_places(root))
    # Every depth equally often: else the many leaves would take all of the damage.
    depth = random.choice(sorted({place[2] for place in places}))
    holder, key, _ = random.choice([place for place in places if place[2] == depth])
    what = random.randrange(8)
    if what == 0 and holder is not root:
        del holder[key]
    elif what == 1:
        other, other_key, _ = random.choice(places)
        try:
            holder[key], other[other_key] = copy.deepcopy(other[other_key]), copy.deepcopy(holder[key])
        except (KeyError, IndexError):
            holder[key] = None
    elif what == 2 and isinstance(holder, list):
        holder.insert(random.randrange(len(holder) + 1), copy.deepcopy(holder[key]))
    elif what == 2 and isinstance(holder[key], dict):
        holder[key][random.choice(TEXTS)] = odd(random, 1)
    elif what == 3 and isinstance(holder, dict) and holder is not root:
        holder[random.choice([*TEXTS, f"{key}s", str(key).upper()])] = holder.pop(key)
    elif what == 4 and isinstance(holder[key], list):
        random.shuffle(holder[key])
    elif what == 5 and isinstance(holder[key], list | dict):
        for inner in random.sample(list(_keys(holder[key])), len(holder[key]) // 2)[::-1]:
            holder[key][inner] = odd(random, holder[key][inner])
    else:
        holder[key] = odd(random, holder[key])


def _keys(value: Any) -> Sequence[Any]:
    return list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()


def _places(value: Any, depth: int = 0) -> list[tuple[Any, Any, int]]:
    found = [(value, key, depth) for key in _keys(value)]
    for key in _keys(value):
        found += _places(value[key], depth + 1)
    return found


def damage_bytes(random: Random, content: bytes) -> bytes:
    """Cut short, flipped, zeroed, swapped, doubled, padded: what disks, transfers and editors do."""
    if not content:
        return b"\0"
    first, second = sorted(random.randrange(len(content) + 1) for _ in range(2))
    what = random.randrange(10)
    if what < 3:
        changed = bytearray(content)
        for _ in range(random.choice((1, 1, 2, 16))):
            changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
        return bytes(changed)
    if what == 3:
        return content[:first]
    if what == 4:
        return content[:first] + bytes(second - first) + content[second:]
    if what == 5:
        return content[:first] + content[second:]
    if what == 6:
        return content[:second] + content[first:]
    if what == 7:
        return content + random.choice([b"\n", b"\0" * 512, content, b"garbage", b"\x1a"])
    if what == 8:
        return random.choice([b"", b"\xef\xbb\xbf" + content, b"<!DOCTYPE html>", b"\x1f\x8b" + content, content[1:]])
    return random.randbytes(min(len(content), 2000))


def damage_json(random: Random, content: bytes) -> bytes:
    """The text of a JSON file with damage to its values, its form or its bytes."""
    what = random.randrange(10)
    if what < 7:
        return json.dumps(damage_tree(random, json.loads(content)), indent=2).encode(errors="surrogatepass")
    if what == 7:  # a key twice, with another value
        lines = content.decode().splitlines(keepends=True)
        keyed = [line for line in lines if '": ' in line and line.rstrip().endswith(",")] or [lines[0]]
        line = random.choice(keyed)
        return content.decode().replace(line, line.replace("1", "2") + line, 1).encode()
    if what == 8:
        depth = random.choice((100, 5000, 100_000))
        return content.replace(b"[", b"[" * depth, 1)
    return damage_bytes(random, content)


BLOCK = 512
_FIELDS = ((0, 100), (100, 108), (124, 136), (136, 148), (156, 157), (157, 257), (257, 265), (345, 500))
"""Of a header: name, mode, size, time, kind, link, magic, prefix."""


def damage_tar(random: Random, content: bytes) -> bytes:
    """Headers with other sizes, kinds and names, whole members twice, swapped or gone, extended headers that lie."""
    what = random.randrange(12)
    members = members_of(content)
    if what < 2 or not members:
        return damage_bytes(random, content)
    place, end = random.choice(members)
    other, other_end = random.choice(members)
    if what < 6:
        return content[:place] + damaged_header(random, content[place : place + BLOCK]) + content[place + BLOCK :]
    if what == 6:
        return content[:end] + content[other:other_end] + content[end:]
    if what == 7:
        return content[:place] + content[end:]
    if what == 8 and place < other:
        middle = content[end:other]
        return content[:place] + content[other:other_end] + middle + content[place:end] + content[other_end:]
    if what == 9:
        return content[:place] + bytes(BLOCK * random.choice((1, 2, 3))) + content[place:]
    if what == 10:
        return content[:place] + _extended(random) + content[place:]
    changed = bytearray(content)
    if end > place + BLOCK:
        changed[random.randrange(place + BLOCK, end)] ^= 1 << random.randrange(8)
    return bytes(changed)


def members_of(content: bytes) -> list[tuple[int, int]]:
    """(start of its header, end of its padded content) of each member of a sound ustar."""
    found: list[tuple[int, int]] = []
    place = 0
    while content[place : place + 1].strip(b"\0"):
        size = int(content[place + 124 : place + 135].strip(b" \0") or b"0", 8)
        end = place + BLOCK + -(-size // BLOCK) * BLOCK
        found.append((place, end))
        place = end
    return found


def with_checksum(header: bytes) -> bytes:
    """The header with the checksum that it should have."""
    total = sum(header[:148]) + sum(header[156:]) + 8 * ord(" ")
    return header[:148] + b"%06o\0 " % total + header[156:]


def damaged_header(random: Random, header: bytes) -> bytes:
    """One field changed; as a rule the checksum is right again, so that somebody believes it."""
    first, last = random.choice(_FIELDS)
    width = last - first
    values = {
        124: (
            b"00000000000\0",
            b"77777777777\0",
            b"-0000000001\0",
            b"\x80" + b"\xff" * 11,
            b"\xff" * 12,
            b"        1 \0\0",
        ),
        156: (b"1", b"2", b"3", b"5", b"6", b"7", b"x", b"g", b"L", b"K", b"S", b"V", b"\0", b"\xff"),
        0: (b"../x.jpg", b"/x.cls", b"000000000.cls", b"000000001.jpg", b".cls", b"x", b"\xff\xfe.jpg", b"a" * 100),
    }.get(first, (b"", b"\xff" * width, b"0" * width))
    value = random.choice([*values, random.randbytes(width), header[first:last].swapcase()])
    changed = header[:first] + value[:width].ljust(width, b"\0") + header[last:]
    return with_checksum(changed) if random.random() < 0.9 else changed


def _extended(random: Random) -> bytes:
    """A pax or GNU header before a member: another path, another size, a record that lies about its length."""
    kind = random.choice((b"x", b"x", b"g", b"L", b"K"))
    pairs = (b"path=000000000.jpg", b"path=../../x.jpg", b"size=1", b"size=99999999999999999999", b"size=-1", b"path=")
    pairs += (b"GNU.sparse.size=9", b"comment=x", b"path=a.cls", b"size=0x10", b"=", b"path")
    pair = random.choice(pairs)
    record = b"%d %s\n" % (len(pair) + 4 + random.choice((0, 0, 0, -3, 1, 90)), pair) if kind in b"xg" else pair
    record = random.choice([record, record * 2, b"0 " + record, b"", record[:-1]])
    header = b"pax".ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + b"%011o\0" % len(record) + b"00000000000\0"
    header += b" " * 8 + kind + bytes(100) + b"ustar\x0000"
    return with_checksum(header.ljust(BLOCK, b"\0")) + record.ljust(-(-len(record) // BLOCK) * BLOCK, b"\0")
