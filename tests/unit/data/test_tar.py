"""Tars that are damaged, foreign or made to harm: each is read as every other reader would, or refused by name."""

import gzip
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.errors import DataError, ExitCode
from pipeline.data.index import ShardIndex
from pipeline.data.shards.tar import MAX_ZERO_BYTES, index_shard
from tests.making.pictures import picture
from tests.making.shards import samples_of, write_tar

BLOCK = 512
PICKLE = b"cos\nsystem\n(S'touch harmed'\ntR."
"""What unpickling runs."""


def header(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, **changed: bytes) -> bytes:
    """One ustar header; `size_field` and `prefix` put other bytes there, and the checksum is made right again."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT)[:BLOCK])
    for field, content in changed.items():
        start = {"size_field": 124, "name": 0}[field]
        block[start : start + len(content)] = content
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def member(name: str, content: bytes, kind: bytes = tarfile.REGTYPE, **changed: bytes) -> bytes:
    return header(name, len(content), kind, **changed) + content + bytes(-len(content) % BLOCK)


def pax_record(key: str, value: str) -> bytes:
    length = len(key) + len(value) + 3
    length += len(str(length + len(str(length))))
    return f"{length} {key}={value}\n".encode()


SAMPLE = member("a.jpg", b"picture") + member("a.cls", b"1")
END = bytes(2 * BLOCK)


def tar_with(*members: tuple[str, bytes], format: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def shard_of(directory: Path, content: bytes) -> Path:
    directory.mkdir(exist_ok=True)
    path = directory / "train-000000.tar"
    path.write_bytes(content)
    return path


def refused(directory: Path, content: bytes) -> str:
    """The sentence by which opening the only shard is refused."""
    root = shard_of(directory, content).parent
    with pytest.raises(DataError) as caught:
        ShardIndex.open(root, "train")
    assert caught.value.exit_code == ExitCode.DATA and "train-000000.tar" in str(caught.value)
    return str(caught.value)


def labels_of(directory: Path, *members: tuple[str, bytes]) -> dict[str, int]:
    """Key to label, through the index, of a shard of these members."""
    content = b"".join(member(*one) for one in members) + END
    index = ShardIndex.open(shard_of(directory, content).parent, "train")
    return {index.sample_key(number): index.label(number) for number in range(len(index))}


# What is read


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_every_writer_are_understood(tmp_path: Path, format: int) -> None:
    """Folders, long names, capitals, other members: as foreign shards have them."""
    long, jpeg = f"{'d' * 80}/{'k' * 90}", picture(1)
    if format == tarfile.PAX_FORMAT:
        long += "ü"
    path = shard_of(
        tmp_path,
        tar_with(
            ("n01/a.JPEG", jpeg),
            ("n01/a.cls", b" 2\n"),
            ("n01/a.json", b"{}"),
            ("n01/a.seg.png", b"not the picture"),
            (f"{long}.cls", b"7"),
            (f"{long}.png", picture(2, encoding="PNG")),
            ("README", b"hello"),
            format=format,
        ),
    )
    index = ShardIndex.open(path.parent, "train")
    assert [index.sample_key(i) for i in range(2)] == ["n01/a", long]
    assert (index.label(0), index.label(1), index.num_classes, index.classes) == (2, 7, 8, None)
    assert index.read(0) == jpeg and index.read(1) == picture(2, encoding="PNG")


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@given(
    names=st.lists(st.text("ab/ü ", min_size=1, max_size=120).filter(lambda n: n.strip("/ ")), max_size=6, unique=True)
)
def test_offsets_and_names_are_those_of_tarfile(
    tmp_path_factory: pytest.TempPathFactory, format: int, names: list[str]
) -> None:
    keys = [f"s{number}/{name.strip('/ ')}" for number, name in enumerate(names) if "//" not in name]
    members = [
        member for n, key in enumerate(keys) for member in ((f"{key}.jpg", key.encode() * n), (f"{key}.cls", b"0"))
    ]
    content = tar_with(*members, format=format)
    path = tmp_path_factory.mktemp("tar") / "one.tar"
    path.write_bytes(content)
    found = index_shard(path)
    assert [bytes(key).decode() for key in found.keys] == keys
    for key, offset, length in zip(keys, found.offsets, found.lengths, strict=True):
        with tarfile.open(path) as tar:
            member = tar.getmember(f"{key}.jpg")
        assert (offset, length) == (member.offset_data, member.size)


# Damage


def cut_points(content: bytes) -> dict[str, int]:
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        members = tar.getmembers()
    last = members[-1]
    end = last.offset_data + -(-last.size // BLOCK) * BLOCK
    return {
        "empty": 0,
        "inside a header": members[2].offset + 100,
        "inside data": members[2].offset_data + 3,
        "between picture and label": members[3].offset,
        "at the end of a member": members[4].offset,
        "without end mark": end,
    }


@pytest.mark.parametrize(
    "where",
    [
        "empty",
        "inside a header",
        "inside data",
        "between picture and label",
        "at the end of a member",
        "without end mark",
    ],
)
def test_a_foreign_shard_cut_short_is_noticed_without_a_manifest(tmp_path: Path, where: str) -> None:
    content = write_tar(tmp_path / "whole.tar", samples_of(0, 3)).read_bytes()
    assert "cut short" in refused(tmp_path / "shards", content[: cut_points(content)[where]])


def test_a_flipped_byte_in_a_header_is_found_by_its_checksum(tmp_path: Path) -> None:
    content = bytearray(write_tar(tmp_path / "whole.tar", samples_of(0, 3)).read_bytes())
    content[cut_points(bytes(content))["between picture and label"] + 2] ^= 1
    message = refused(tmp_path / "shards", bytes(content))
    assert "damaged tar header" in message


@pytest.mark.parametrize(
    ("members", "complaint"),
    [
        pytest.param([("a.jpg", b"x")], "'a' of shard train-000000.tar has no label", id="no label"),
        pytest.param([("a.cls", b"1")], "'a' of shard train-000000.tar has no picture", id="no picture"),
        pytest.param([("a.jpg", b"x"), ("a.cls", b"1"), ("a.jpeg", b"y")], "'a' twice", id="two pictures"),
        pytest.param([("a.jpg", b"x"), ("a.cls", b"1"), ("a.cls", b"1")], "'a' twice", id="two labels"),
        pytest.param([("../a.jpg", b"x")], "leaves the archive", id="parent"),
        pytest.param([("b/../../a.txt", b"x")], "leaves the archive", id="parent inside"),
        pytest.param([("/etc/a.jpg", b"x")], "leaves the archive", id="absolute"),
        pytest.param([(f"{'k' * 300}.jpg", b"x")], "key of 300 bytes", id="endless key"),
    ],
)
def test_shards_that_no_honest_writer_makes_are_refused(
    tmp_path: Path, members: list[tuple[str, bytes]], complaint: str
) -> None:
    assert complaint in refused(tmp_path, tar_with(*members, format=tarfile.PAX_FORMAT))


def test_a_tar_without_any_sample_is_refused(tmp_path: Path) -> None:
    shard_of(tmp_path, tar_with(("a.txt", b"x")))
    with pytest.raises(DataError, match="holds no sample"):
        ShardIndex.open(tmp_path, "train")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        info = tarfile.TarInfo("a.jpg")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    assert "only regular files" in refused(tmp_path, buffer.getvalue())


def test_two_tars_joined_into_one_are_not_half_read(tmp_path: Path) -> None:
    whole = tar_with(("a.jpg", b"x"), ("a.cls", b"1"))
    assert "after the end mark" in refused(tmp_path, whole + whole)


@pytest.mark.parametrize("seed", range(5))
def test_damage_anywhere_is_a_sentence_or_harmless(tmp_path: Path, seed: int) -> None:
    """Whatever bytes are flipped, the answer is an index of existing bytes or a DataError, never another exception."""
    content = bytearray(write_tar(tmp_path / "whole.tar", samples_of(0, 3)).read_bytes())
    generator = np.random.default_rng(seed)
    for attempt in range(60):
        damaged = bytearray(content)
        for place in generator.integers(0, len(content), 3):
            damaged[place] = generator.integers(256)
        root = shard_of(tmp_path / str(attempt), bytes(damaged)).parent
        try:
            index = ShardIndex.open(root, "train")
        except DataError as error:
            assert "train-000000.tar" in str(error)
        else:
            assert all(len(index.read(sample_id)) for sample_id in range(index.num_samples))


# Sizes and kinds


@pytest.mark.parametrize(
    "digits", [b"0o7", b"1_1", b"-1", b"+7", b"7.0", b"\xffnonsense"[:8], b"99999999999"], ids=repr
)
def test_a_size_that_is_no_octal_number_is_refused(tmp_path: Path, digits: bytes) -> None:
    content = member("a.jpg", b"picture", size_field=digits.ljust(12, b"\0")) + member("a.cls", b"1") + END
    message = refused(tmp_path, content)
    assert "size cannot be read" in message or "cut short" in message


@pytest.mark.parametrize("size", ["1_0", " 7", "-7", "0x7", "", "7" * 5000])
def test_a_pax_size_that_is_no_decimal_number_is_refused(tmp_path: Path, size: str) -> None:
    content = member("pax", pax_record("size", size), tarfile.XHDTYPE) + SAMPLE + END
    message = refused(tmp_path, content)
    assert "size cannot be read" in message or "cut short" in message


@pytest.mark.parametrize("claimed", [2**63 - 1, 8 * 10**18, 2**62])
def test_a_member_of_exabytes_is_refused_from_its_header(tmp_path: Path, claimed: int) -> None:
    content = member("a.jpg", b"picture", size_field=b"\x80" + claimed.to_bytes(11, "big")) + END
    assert "cut short" in refused(tmp_path, content) and str(claimed) not in str(len(content))


def test_a_directory_has_no_content_whatever_its_header_says(tmp_path: Path) -> None:
    """As in tarfile: two readers that disagree about where the next header is would see two sets of samples."""
    content = header("n01", 5 * BLOCK, tarfile.DIRTYPE) + SAMPLE + END
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        assert tar.getnames() == ["n01", "a.jpg", "a.cls"]
    assert ShardIndex.open(shard_of(tmp_path, content).parent, "train").sample_key(0) == "a"


def pax(kind: bytes, key: str, value: str) -> bytes:
    return member("pax", pax_record(key, value), kind)


def long_name(name: bytes) -> bytes:
    return member("././@LongLink", name, tarfile.GNUTYPE_LONGNAME)


@pytest.mark.parametrize(
    ("before", "complaint"),
    [
        pytest.param(member("a.jpg", b"x" * BLOCK, tarfile.GNUTYPE_SPARSE), "a sparse file", id="GNU sparse"),
        pytest.param(pax(tarfile.XHDTYPE, "GNU.sparse.major", "1"), "a sparse file", id="pax sparse"),
        pytest.param(pax(tarfile.XGLTYPE, "path", "b.jpg"), "all its members one 'path'", id="global path"),
        pytest.param(pax(tarfile.XGLTYPE, "size", "1"), "all its members one 'size'", id="global size"),
        pytest.param(member("pax", b"99 path=b.jpg\n", tarfile.XHDTYPE), "damaged pax", id="pax length"),
        pytest.param(pax(tarfile.XHDTYPE, "path", "../../b.jpg"), "leaves the archive", id="pax escape"),
        pytest.param(pax(tarfile.XHDTYPE, "path", "b\0.jpg"), "leaves the archive", id="pax NUL"),
        pytest.param(long_name(b"/etc/b.jpg\0"), "leaves the archive", id="GNU escape"),
        pytest.param(long_name(b"x" * 70_000), "70000 bytes", id="endless name"),
        pytest.param(member("a.jpg", b"", b"M"), "a member of type b'M'", id="continued volume"),
    ],
)
def test_members_that_other_readers_would_see_otherwise_are_refused(
    tmp_path: Path, before: bytes, complaint: str
) -> None:
    assert complaint in refused(tmp_path, before + SAMPLE + END)


def test_a_harmless_global_record_is_passed_over(tmp_path: Path) -> None:
    content = member("pax", pax_record("comment", "of git archive"), tarfile.XGLTYPE) + SAMPLE + END
    assert len(ShardIndex.open(shard_of(tmp_path, content).parent, "train")) == 1


@pytest.mark.parametrize("zeros", [MAX_ZERO_BYTES, MAX_ZERO_BYTES + BLOCK])
def test_a_download_that_died_on_its_way_is_not_taken_for_a_short_shard(tmp_path: Path, zeros: int) -> None:
    content = SAMPLE + bytes(zeros)
    if zeros <= MAX_ZERO_BYTES:  # as far as blocking factors go
        assert len(ShardIndex.open(shard_of(tmp_path, content).parent, "train")) == 1
    else:
        assert f"ends with {zeros} bytes of zeros" in refused(tmp_path, content)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        pytest.param(gzip.compress(SAMPLE + END), "compressed with gzip", id="gzip"),
        pytest.param(b"<!DOCTYPE html><p>Sign in" + bytes(BLOCK), "web page", id="web page"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer", id="LFS pointer"),
        pytest.param(picture(0, height=60, width=60), "damaged tar header at byte 0", id="picture"),
    ],
)
def test_what_is_no_tar_is_called_what_it_is(tmp_path: Path, content: bytes, what: str) -> None:
    content = content.ljust(BLOCK, b"\1")
    with pytest.raises(tarfile.ReadError), tarfile.open(fileobj=io.BytesIO(content), mode="r:"):
        pass
    assert what in refused(tmp_path, content)


# Members that are not read


def test_what_a_mac_leaves_in_a_shard_is_counted(tmp_path: Path) -> None:
    content = member("._a.jpg", b"x") + SAMPLE + member("folder/._a.cls", b"x") + END
    found = index_shard(shard_of(tmp_path, content))
    assert len(found.keys) == 1 and found.ignored == {"hidden": 2}


@pytest.mark.parametrize("extension", ["pth", "pickle", "pkl", "pyd", "pt", "npy", "sh"])
def test_code_beside_the_pictures_is_neither_read_nor_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extension: str
) -> None:
    monkeypatch.chdir(tmp_path)
    content = SAMPLE + member(f"a.{extension}", PICKLE) + member(f"b.{extension}", PICKLE) + END
    path = shard_of(tmp_path / "shards", content)
    index = ShardIndex.open(path.parent, "train")
    assert [index.read(number) for number in range(len(index))] == [b"picture"]
    assert index_shard(path).ignored == {f".{extension}": 2}
    assert not (tmp_path / "harmed").exists()


def test_extensions_that_are_not_read_are_counted_in_bounded_memory(tmp_path: Path) -> None:
    content = SAMPLE + b"".join(member(f"a.x{number}", b"") for number in range(100)) + END
    ignored = index_shard(shard_of(tmp_path, content)).ignored
    assert sum(ignored.values()) == 100 and len(ignored) == 33 and ignored["..."] == 68


def test_pictures_of_another_format_are_said_to_be_that(tmp_path: Path) -> None:
    message = refused(tmp_path, member("a.webp", b"x") + member("a.cls", b"1") + END)
    assert "'a'" in message and "no picture" in message and ".webp are not read" in message


MEASURE = """
import resource, sys
from pathlib import Path
from pipeline.data.shards.tar import index_shard

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

before = peak()
samples = index_shard(Path(sys.argv[1]), lambda error: None)
print(len(samples.keys), sum(samples.ignored.values()), (peak() - before) * 1024)
"""


def measured(path: Path) -> list[int]:
    """(samples, members not read, bytes by which the peak of the process grew) of a scan in a process of its own."""
    command = [sys.executable, "-c", MEASURE, str(path)]
    return [int(word) for word in subprocess.run(command, capture_output=True, timeout=300, check=True).stdout.split()]


def write_members(path: Path, names: Sequence[str]) -> Path:
    """Empty members, written as they come: a million of them are half a gigabyte."""
    template = header("0" * 20)
    base = sum(template) - sum(template[148:156]) + 8 * 32 - sum(template[:100])
    with path.open("wb") as file:
        for name in names:
            field = name.encode().ljust(100, b"\0")
            file.write(field + template[100:148] + b"%06o\0 " % (base + sum(field)) + template[156:])
        file.write(END)
    return path


@pytest.mark.not_quick
@pytest.mark.parametrize("num_members", [50_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_a_million_members_take_bounded_memory(tmp_path: Path, num_members: int) -> None:
    names = [f"d{number % 7}/{number:07d}.txt" for number in range(num_members)]
    path = write_members(tmp_path / "txt.tar", names)
    num_samples, num_ignored, grown_bytes = measured(path)
    assert (num_samples, num_ignored) == (0, num_members)
    assert grown_bytes < 8 * 2**20


@pytest.mark.not_quick
@pytest.mark.slow
def test_a_million_samples_take_bounded_memory_and_more_are_refused(tmp_path: Path) -> None:
    """Pictures whose labels are missing cost what whole samples do."""
    names = [f"n01440764/n01440764_{number:07d}.jpg" for number in range(2**20 + 1)]
    _, _, grown_bytes = measured(write_members(tmp_path / "most.tar", names[:-1]))
    assert grown_bytes < 400 * 2**20
    with pytest.raises(DataError, match="more than 1,048,576 samples"):
        index_shard(write_members(tmp_path / "more.tar", names))


# Labels


def json_label(**fields: object) -> bytes:
    return json.dumps(fields).encode()


def test_labels_in_json_as_public_shards_have_them(tmp_path: Path) -> None:
    found = labels_of(
        tmp_path,
        ("n1/a.jpg", b"x"),
        ("n1/a.json", json_label(filename="a.JPEG", label=417, width=500)),
        ("b.json", json_label(label=3)),
        ("b.PNG", b"x"),
        ("c.cls", b" 5\n"),
        ("c.JPEG", b"x"),
        ("c.json", json_label(label="a name: .cls is the label")),
        ("d.json", b"neither read nor needed"),
        ("d.jpeg", b"x"),
        ("d.cls", b"7"),
        ("dataset.json", json_label(made_by="somebody")),
    )
    assert found == {"n1/a": 417, "b": 3, "c": 5, "d": 7}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[1]",
        b"3",
        b"null",
        b"{}",
        b'{"label": "3"}',
        b'{"label": 3.0}',
        b'{"label": true}',
        b'{"label": null}',
        b'{"label": [3]}',
        b'{"label": -1}',
        b'{"label": 99999999999999999999}',
        b'{"label": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b"\xff\xfe{}",
        b'{"label": 1, "padding": "' + b"x" * 2**20 + b'"}',
    ],
    ids=lambda content: repr(content[:20]),
)
def test_a_bad_label_in_json_is_named_with_key_and_shard(tmp_path: Path, content: bytes) -> None:
    message = refused(tmp_path, SAMPLE + member("bad.json", content) + member("bad.jpg", b"x") + END)
    assert "'bad'" in message and "label" in message and len(message) < 400


def test_scanning_can_go_on_past_bad_samples(tmp_path: Path) -> None:
    """As a check of the whole shard wants it."""
    bad = member("b.jpg", b"x") + member("c.cls", b"1") + member("d.jpg", b"x") + member("d.cls", b"dog")
    path = shard_of(tmp_path, SAMPLE + bad + member("a.jpg", b"again") + member(f"{'k' * 99}", b"") + END)
    complaints: list[str] = []
    samples = index_shard(path, lambda error: complaints.append(str(error)))
    assert samples.keys.tolist() == [b"a"] and samples.labels.tolist() == [1]
    assert len(complaints) == 4
    for key, complaint in zip(("'d'", "'a' twice", "'b'", "'c'"), complaints, strict=True):
        assert key in complaint


def test_duplicates_are_found_however_far_apart(tmp_path: Path) -> None:
    samples = samples_of(0, 30)
    content = write_tar(tmp_path / "whole.tar", [*samples, samples[0]]).read_bytes()
    assert "'000000000' twice" in refused(tmp_path / "shards", content)
