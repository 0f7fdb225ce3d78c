"""The shards of a split behind a URL: listed there, kept in the cache of this server, read from it.

What tells where the samples lie is the index that `prepare` wrote beside the shards (`<split>.index.npz`, with its hash
in the manifest): reading the headers of remote tars would take a request per sample. Shards without it (foreign ones,
or of an earlier version) are fetched once and indexed in the cache. Either way a shard's headers are compared with the
index when it arrives, and the hash of the index is the one it has on a local disk, so that the order is the same.
"""

import hashlib
import json
import os
import re
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pipeline.core.errors import DataError
from pipeline.data.remote.cache import Cache, CacheEntry, CacheSettings, Produce
from pipeline.data.remote.opening import open_store
from pipeline.data.remote.store import Store
from pipeline.data.remote.transfer import Expected, FetchBudget, Pulse, fetch, head, names, no_pulse, say
from pipeline.data.shards.foreign import INFO_NAMES, Info, shards_by_prefix
from pipeline.data.shards.manifest import MAKE_ANEW, MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest
from pipeline.data.shards.opened import OpenedSplit
from pipeline.data.shards.scan import scan_shard, threads
from pipeline.data.shards.table import INDEX_KEY, SCHEMA, SampleTable, ShardFile, index_name, shards_of
from pipeline.data.shards.tar import ShardSamples

FRESH_SECONDS = 10.0
"""For so long the processes of a server share what one of them was told: ranks start together."""
NUM_LISTING_THREADS = 16
NUM_FETCH_THREADS = 4
MAX_NAMES_SHOWN = 20


class RemoteFiles:
    """The shards of a split, read through the cache (shards.opened.ShardFiles). Pickles; connects where it is used.

    Args:
        validators: of the server when the run began; one per shard, used for shards without a hash.
        table: what their headers must say; None: not known yet.
    """

    def __init__(
        self,
        url: str,
        shards: tuple[ShardFile, ...],
        validators: Sequence[str | None],
        cache: Cache,
        table: SampleTable | None = None,
    ) -> None:
        self.url, self.shards, self.cache, self.table = url, shards, cache, table
        self.validators = tuple(validators)
        self._connection = Connection(url, cache.budget)

    def read(self, shard: int, offset: int, length: int) -> bytes:
        """See ShardFiles; fetches the shard if it is not here.

        Raises:
            DataError: it cannot be fetched, or is not what it was.
        """
        with self.cache.open(self.entry(shard), self.producer(shard)) as descriptor:
            return os.pread(descriptor, length, offset)

    def fetch_ahead(self, shard: int, pulse: Pulse = no_pulse) -> bool:
        """Fetch a shard for later; False if that must wait. Raises DataError, and what `pulse` raises."""
        return self.cache.fetch_ahead(self.entry(shard), self.producer(shard, pulse))

    def release(self, shard: int) -> None:
        """Say that a shard is not needed soon."""
        self.cache.release(self.entry(shard))

    def has(self, shard: int) -> bool:
        """Whether the shard is here."""
        return self.cache.has(self.entry(shard))

    def close(self) -> None:
        """See ShardFiles."""
        self._connection.close()

    def entry(self, shard: int) -> CacheEntry:
        """A shard with a hash is known by it, wherever it came from; another by its address, size and tag."""
        file = self.shards[shard]
        key = file.sha256 or _key("shard", self.url, file.name, file.bytes, self.validators[shard])
        return CacheEntry(key, f"{file.name} of {self.url}", file.bytes)

    def producer(self, shard: int, pulse: Pulse = no_pulse) -> Produce:
        """How a shard comes into the cache: whole, with the right hash, holding what the index says."""
        file = self.shards[shard]
        validator = None if file.sha256 else self.validators[shard]

        def produce(sink: BinaryIO, part: Path) -> None:
            expected = Expected(file.bytes, file.sha256, validator)
            store, budget = self._connection.store, self.cache.budget
            fetch(store, file.name, sink, expected=expected, budget=budget, pulse=pulse)
            if self.table is not None and not self.table.agrees_with(shard, scan_shard(part, file, f"at {self.url}")):
                raise DataError(
                    f"Shard {file.name} at {self.url} does not hold the samples that the index lists: copy there again"
                    " all that `prepare` made."
                )

        return produce


class Connection:
    """The store of a URL, opened once in each process that uses it."""

    def __init__(self, url: str, budget: FetchBudget) -> None:
        self.url, self.budget = url, budget
        self._start_empty()

    @property
    def store(self) -> Store:
        """Made by the first thread that asks; a forked child makes its own."""
        with self._lock:
            if self._store is None or self._owner != os.getpid():
                self._store, self._owner = open_store(self.url, self.budget.timeouts), os.getpid()
            return self._store

    def close(self) -> None:
        """Let go of the connections."""
        self._store = None

    def _start_empty(self) -> None:
        self._store: Store | None = None
        self._owner = 0
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "budget": self.budget}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start_empty()


def open_remote(url: str, split: str, verify: str, settings: CacheSettings) -> OpenedSplit:
    """Verify the shards of a split behind a URL, and fetch or make their index.

    Args:
        url: Where the shards lie.
        split: As for `ShardIndex.open`.
        verify: `sha256` hashes again what is in the cache already; what arrives is hashed in any case.
        settings: Where and how long objects are kept.

    Raises:
        DataError: shards are missing, the server or the cache cannot be used, or the index is not of the shards.
    """
    place = _Place(url, split, settings)
    manifest = place.manifest()
    info = None if manifest else place.info()
    shards, validators = place.listing(manifest, info)
    files = RemoteFiles(place.url, shards, validators, place.cache)
    if verify == "sha256":
        _hash_again(files)
    listed = manifest.split(split) if manifest else None
    described = listed.extra.get(INDEX_KEY) if listed else None
    table = place.fetched_table(shards, described) if described else place.scanned_table(files)
    if not len(table.label):
        raise DataError(f"Split {split!r} at {place.url} holds no sample: prepare it again into an empty out=.")
    told = info.find(split) if info else None
    if told:
        counts = np.bincount(table.shard, minlength=len(shards)).tolist()
        told.check_counts(zip((shard.name for shard in shards), counts, strict=True))
    return OpenedSplit(
        shards,
        table,
        RemoteFiles(place.url, shards, validators, place.cache, table),
        classes=manifest.classes if manifest else None,
        is_checked=listed is not None and listed.is_checked,
    )


def check_remote(url: str, split: str, settings: CacheSettings) -> None:
    """Raise the DataError that `open_remote` would raise without fetching an index or a shard."""
    place = _Place(url, split, settings)
    manifest = place.manifest()
    place.listing(manifest, None if manifest else place.info())


class _Place:
    """A split at a URL, looked at through the cache: what one process is told, its neighbours take from there."""

    def __init__(self, url: str, split: str, settings: CacheSettings) -> None:
        self.url, self.split = url.rstrip("/"), split
        self.cache = Cache(settings, self.url)
        self.budget = settings.budget
        self.connection = Connection(self.url, self.budget)
        assert self.connection.store  # a URL that means nothing is refused before a directory is made
        self.cache.prepare()

    def manifest(self) -> Manifest | None:
        """The manifest; None where foreign shards are named one by one, or there is none."""
        if self.split.endswith(".tar"):
            return None

        content = self._beside(MANIFEST_NAME, "manifest")
        return Manifest.parse(content, f"{self.url}/{MANIFEST_NAME}") if content else None

    def info(self) -> Info:
        """What timm's `_info.json` says of foreign shards; nothing where there is none."""
        for name in INFO_NAMES:
            content = self._beside(name, "info", name, is_optional=True)
            if content and (info := Info.parse(content, f"{self.url}/{name}")):
                return info
        return Info(f"{self.url}/{INFO_NAMES[0]}")

    def _beside(self, name: str, *key: str, is_optional: bool = False) -> bytes:
        """The content of a file that lies beside the shards; nothing where there is none."""

        def produce(file: BinaryIO, part: Path) -> None:
            del part
            if head(self.connection.store, name, self.budget, is_optional=is_optional) is not None:
                expected = Expected(most_bytes=MAX_MANIFEST_BYTES)
                fetch(self.connection.store, name, file, expected=expected, budget=self.budget)

        entry = CacheEntry(_key(*key, self.url), f"{name} of {self.url}")
        with self.cache.open(entry, produce, max_age_seconds=FRESH_SECONDS) as descriptor:
            return os.pread(descriptor, os.fstat(descriptor).st_size, 0)

    def listing(self, manifest: Manifest | None, info: Info | None) -> tuple[tuple[ShardFile, ...], list[str | None]]:
        """The shards, each there with its size, and what the server says of their versions.

        Args:
            manifest: The manifest; None: the shards are foreign.
            info: What `_info.json` says of foreign shards; None with a manifest.
        """
        shards = shards_of(manifest, self.split) if manifest else ()
        for shard in shards:
            _check_hash(shard.sha256, shard.name, self.url)

        def produce(file: BinaryIO, part: Path) -> None:
            found = shards or [ShardFile(name, -1, None, None) for name in self._foreign_names(info)]
            file.write(json.dumps(self._looked_up(found, part)).encode())

        told = info.splits if info else None
        entry = CacheEntry(
            _key("listing", self.url, self.split, told, *map(asdict, shards)), f"the listing of {self.url}"
        )
        with self.cache.open(entry, produce, max_age_seconds=FRESH_SECONDS) as descriptor:
            listed = json.loads(os.pread(descriptor, os.fstat(descriptor).st_size, 0))
        if not shards:
            shards = tuple(ShardFile(name, num_bytes, None, None) for name, num_bytes, _ in listed)
        return shards, [validator for _, _, validator in listed]

    def _foreign_names(self, info: Info | None) -> Sequence[str]:
        """As `foreign.find_split` finds them in a directory."""
        has_names = self.split.endswith(".tar")
        everything = None if has_names else names(self.connection.store, self.budget)
        by_prefix = shards_by_prefix(self.split, everything or ())
        told = info.find(self.split, by_prefix) if info else None
        if told:
            return told.names
        known = f"; {info.where} knows the splits {', '.join(sorted(info.splits))}" if info and info.splits else ""
        if everything is None:
            raise DataError(
                f"{self.url} has no {MANIFEST_NAME}, and a web server does not list its files: give the shards' names"
                f" with braces as the split, as in 'data.train_split=\"{self.split}-{{000000..000146}}.tar\"'{known}."
            )
        if not by_prefix:
            raise DataError(
                f"{self.url} has no {MANIFEST_NAME} and no shards {self.split}-*.tar{known}: correct data.root or the"
                " split."
            )
        return by_prefix

    def _looked_up(self, shards: Sequence[ShardFile], part: Path) -> list[tuple[str, int, str | None]]:
        """[(name, bytes, validator)], asked for side by side."""
        store = self.connection.store
        with threads(NUM_LISTING_THREADS) as pool:
            stats = list(pool.map(lambda s: head(store, s.name, self.budget, lambda: os.utime(part)), shards))
        missing = [shard.name for shard, stat in zip(shards, stats, strict=True) if stat is None]
        if missing:
            shown = ", ".join(missing[:MAX_NAMES_SHOWN]) + (", ..." if len(missing) > MAX_NAMES_SHOWN else "")
            raise DataError(
                f"{len(missing)} of {len(shards)} shards of split {self.split!r} are missing at {self.url}: {shown}."
                " Copy them there again, or prepare the shards again."
            )
        listed = []
        for shard, stat in zip(shards, stats, strict=True):
            assert stat is not None
            if stat.num_bytes is None and shard.bytes < 0:
                raise DataError(f"{self.url} does not say how large {shard.name} is: serve it with a Content-Length.")
            if stat.num_bytes is not None and shard.bytes not in (-1, stat.num_bytes):
                raise DataError(
                    f"Shard {shard.name} at {self.url} has {stat.num_bytes} bytes, and the manifest says"
                    f" {shard.bytes}: copy it there again from its source, or prepare the shards again."
                )
            listed.append((shard.name, stat.num_bytes if stat.num_bytes is not None else shard.bytes, stat.validator))
        return listed

    def fetched_table(self, shards: tuple[ShardFile, ...], described: Any) -> SampleTable:
        """The index that `prepare` wrote."""
        try:
            name, num_bytes, sha256 = described["name"], described["bytes"], described["sha256"]
            if name != index_name(self.split):
                raise ValueError(name)
            entry = CacheEntry(sha256, f"{name} of {self.url}", int(num_bytes))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{self.url}/{MANIFEST_NAME} describes the index of split {self.split!r} wrongly. {MAKE_ANEW}"
            ) from error
        _check_hash(sha256, name, self.url)

        def produce(file: BinaryIO, part: Path) -> None:
            del part
            expected = Expected(num_bytes, sha256)
            fetch(self.connection.store, name, file, expected=expected, budget=self.budget)

        with self.cache.open(entry, produce):
            return SampleTable.load(self.cache.path(entry), shards)

    def scanned_table(self, files: RemoteFiles) -> SampleTable:
        """The index of shards that come without one: made once per server, of all shards, in the cache."""

        def produce(file: BinaryIO, part: Path) -> None:
            total = sum(shard.bytes for shard in files.shards)
            say(
                f"{self.url} has no index of split {self.split!r} (prepare writes one): all of its"
                f" {len(files.shards)} shards, {total / 1e9:.3g} GB, are fetched to make it"
            )
            _scanned(files, lambda: os.utime(part)).save(file)

        known = [files.entry(shard).key for shard in range(len(files.shards))]
        entry = CacheEntry(_key("index", SCHEMA, *known), f"the index of {self.url}")
        with self.cache.open(entry, produce):
            return SampleTable.load(self.cache.path(entry), files.shards)


def _scanned(files: RemoteFiles, pulse: Pulse) -> SampleTable:
    def one(shard: int) -> ShardSamples:
        entry, file = files.entry(shard), files.shards[shard]
        with files.cache.open(entry, files.producer(shard, pulse)):
            return scan_shard(files.cache.path(entry), file, f"at {files.url}")

    with threads(NUM_FETCH_THREADS) as pool:
        return SampleTable.of(list(pool.map(one, range(len(files.shards)))))


def _hash_again(files: RemoteFiles) -> None:
    """Remove what has changed in the cache, so that it is fetched anew."""
    for shard, file in enumerate(files.shards):
        entry = files.entry(shard)
        with files.cache.look(entry) as descriptor:
            is_sound = descriptor is None or file.sha256 in (None, _sha256_of(descriptor))
        if not is_sound:
            say(f"{file.name} was damaged in {files.cache.directory}; it is fetched again")
            files.cache.remove(entry)


def _sha256_of(descriptor: int) -> str | None:
    """Hexadecimal; None if it cannot be read."""
    try:
        with os.fdopen(os.dup(descriptor), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def _check_hash(value: Any, name: str, url: str) -> None:
    """Hashes become file names in the cache: whatever else a manifest may hold must not get there."""
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
        raise DataError(f"{url}/{MANIFEST_NAME} says that {name} has the SHA-256 {value!r}, which is none. {MAKE_ANEW}")


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
