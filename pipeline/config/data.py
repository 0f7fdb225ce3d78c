"""Where the shards of a command are, and how their pictures are read and cut."""

from dataclasses import dataclass, field

from pipeline.config.model import require_side
from pipeline.core.secrets import refuse_secret
from pipeline.core.typed import PathText, one_of, require


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How a training picture is cut. A pure function of (seed, epoch, sample id)."""

    crop: str = "random_resized"
    """`random_resized`: area and ratio drawn; `random`: fixed scale, random place; `pad_random`: pad, then random
    place; `center`: as in evaluation."""
    scale: tuple[float, float] = (0.08, 1.0)
    """random_resized: share of the picture's area, lowest and highest."""
    ratio: tuple[float, float] = (0.75, 4.0 / 3.0)
    """random_resized: width over height, lowest and highest."""
    pad: int = 4
    """pad_random: pixels added on each side."""
    flip: bool = True
    """Mirror left to right with probability one half."""

    def __post_init__(self) -> None:
        one_of("data.augment.crop", self.crop, ("random_resized", "random", "pad_random", "center"))
        low, high = self.scale
        require(0 < low <= high <= 1, f"data.augment.scale={self.scale} must satisfy 0 < low <= high <= 1.")
        low, high = self.ratio
        require(0 < low <= high, f"data.augment.ratio={self.ratio} must satisfy 0 < low <= high.")
        require(self.pad >= 0, f"data.augment.pad={self.pad} must not be negative.")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the shards are and how they are read."""

    root: PathText | None = None
    """What `prepare` made, or foreign shards: in a directory, at http(s)://host/path or at s3://bucket/prefix."""
    cache_dir: PathText | None = None
    """Shards from elsewhere are kept in `squeezewire` below it, once per server: on a local disk. Null: below the
    user's cache."""
    cache_bytes: int = 200_000_000_000
    """Most the cache may hold; what was not used for longest goes first."""
    fetch_timeout_seconds: float = 300.0
    """How long a server may fail to deliver before the run stops. Keep it below the timeouts of cluster."""
    size: int | None = None
    """Crop side in pixels; null: what the model's input says. The side to resize to keeps its ratio to it."""
    train_split: str = "train"
    val_split: str = "val"
    num_workers: int | None = None
    """DataLoader processes per rank; null: chosen from the cores a rank may use."""
    shuffle_block: int = 0
    """0: one permutation of all samples. N: shards are shuffled and mixed N at a time, which reads in long runs."""
    shuffle_groups: int = 1
    """With shuffle_block: parts of a batch that read shards of their own. Servers that divide it fetch their part."""
    tail: str = "drop"
    """Samples that fill no whole batch at the end of an epoch: `drop` leaves them out, others each time; `pad` fills
    their batch with those shown just before."""
    max_bad_fraction: float = 0.0
    """Share of samples that may fail to decode (each is replaced and named) before the run stops. A shard that is cut
    short ends the run at its start in any case."""
    verify: str = "size"
    """At start: `size` compares each shard's bytes with the manifest, `sha256` reads and hashes it too."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        one_of("data.verify", self.verify, ("size", "sha256"))
        one_of("data.tail", self.tail, ("drop", "pad"))
        if self.size is not None:
            require_side("data.size", self.size)
        require(self.num_workers is None or self.num_workers >= 0, f"data.num_workers={self.num_workers} must be >= 0.")
        require(self.shuffle_block >= 0, f"data.shuffle_block={self.shuffle_block} must be >= 0.")
        refuse_secret("data.root", self.root)
        require(self.shuffle_groups >= 1, f"data.shuffle_groups={self.shuffle_groups} must be >= 1.")
        require(self.cache_bytes > 0, f"data.cache_bytes={self.cache_bytes} must be positive.")
        require(self.fetch_timeout_seconds > 0, "data.fetch_timeout_seconds must be positive.")
        require(0 <= self.max_bad_fraction < 1, f"data.max_bad_fraction={self.max_bad_fraction} must be in [0, 1).")
