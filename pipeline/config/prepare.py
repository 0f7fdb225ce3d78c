"""What `prepare` may be told."""

from dataclasses import dataclass

from pipeline.core.typed import PathText, one_of, require

CHECKS = ("pixels", "ends")


LAYOUTS = ("classes", "splits")


KINDS = ("folders", "tar", "ilsvrc2012", "builtin")


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Pictures to verified WebDataset shards: `<key>.jpg` and `<key>.cls` in plain tars, and a manifest.

    The same input gives the same bytes whatever num_workers is; run again after a kill, it resumes; finished, it exits
    at once.
    """

    source: PathText | None = None
    """A directory of class folders, a tar of them, one of ILSVRC2012's archives or the directory that holds them, or
    `builtin`: the generator of a learnable picture set."""
    out: PathText
    """Directory for the shards. Splits that are there already are kept, if they have the same classes."""
    verify: bool = False
    """Write nothing: read the shards in `out`, ours or foreign ones, and name everything that is wrong with sizes,
    hashes, members, labels and pictures. Exit code 3 if anything is. `split` and `num_workers` count here too."""
    split: str | None = None
    """The split to write. Null: every split that the source has. Where it has none of its own, the name to give it
    (null: train). A `test` folder becomes `val`, unless there is a `val` too."""
    val_fraction: float | None = None
    """Share of each class to hold out as the split `val`, of a source that has one split alone. Pictures of the same
    bytes stay on one side; `seed` says which are held out. Null: none."""
    layout: str | None = None
    """What the outermost folders of the source are: `classes` or `splits`. Null: recognised, by the names of splits
    (Train, training, valid, test2017 ...) and by what lies where; asked for where both could be meant."""
    classes: PathText | None = None
    """Text file of class names in index order, one per line. Null: those already in `out`, else sorted folder names."""
    labels: PathText | None = None
    """Text file whose lines name a picture and its class, for a split without class folders: Kaggle's
    LOC_val_solution.csv, tiny-imagenet's val_annotations.txt, and their like. Null: those two are looked for."""
    devkit: PathText | None = None
    """ILSVRC2012_devkit_t12.tar.gz, packed or not: the labels of ILSVRC2012's validation pictures. Null: looked for
    beside them."""
    kind: str | None = None
    """folders, tar, ilsvrc2012 or builtin. Null: recognised from the source."""
    seed: int = 0
    """Fixes the random order in which samples are written, and the pictures of `builtin`."""
    shard_bytes: int = 64 * 1024**2
    """Bytes that a shard should have, about; all shards of a split come out about equally large."""
    short_side: int | None = None
    """Pixels to which the shorter side of larger pictures is reduced. Null: they stay as they are, byte for byte."""
    jpeg_quality: int = 90
    """Quality, 1 to 95, of what must be encoded: pictures that are reduced, and PNGs."""
    check: str = "pixels"
    """How pictures that stay as they are get judged. `pixels`: decoded to the last byte. `ends`: only header and end
    mark, several times as fast, for pictures that were compared with a checksum; training then decodes all of them."""
    max_bad_fraction: float = 0.0
    """Share of a split's pictures that may fail to decode. They are left out and named in the manifest."""
    num_workers: int | None = None
    """Processes that write shards. Null: one per core."""
    num_images: int = 2000
    """builtin: training pictures; a quarter as many validation pictures are made beside them."""
    num_classes: int = 10
    """builtin: classes, 2 to 10."""

    def __post_init__(self) -> None:
        if self.kind is not None:
            one_of("kind", self.kind, KINDS)
        if self.layout is not None:
            one_of("layout", self.layout, LAYOUTS)
        require(self.source is not None or self.verify, "source is not set: add source=... to the command.")
        require(
            self.source is None or not self.verify,
            f"verify=true checks out={self.out} and reads no source: leave out source={self.source}, or verify=.",
        )
        require(
            self.val_fraction is None or 0 < self.val_fraction < 1,
            f"val_fraction={self.val_fraction} is the share to hold out: between 0 and 1, such as 0.1.",
        )
        require(
            self.val_fraction is None or self.split is None,
            f"val_fraction={self.val_fraction} writes two splits, train and val: leave split={self.split} out.",
        )
        one_of("check", self.check, CHECKS)
        name = self.split or "train"
        require(
            self.verify or (name.replace("_", "").isalnum() and name.isascii()),
            f"split={self.split!r} names files: use letters, digits and underscores.",
        )
        require(self.shard_bytes >= 1, f"shard_bytes={self.shard_bytes} must be positive.")
        require(self.short_side is None or self.short_side >= 1, f"short_side={self.short_side} must be positive.")
        require(1 <= self.jpeg_quality <= 95, f"jpeg_quality={self.jpeg_quality} must be from 1 to 95.")
        require(
            0 <= self.max_bad_fraction <= 1, f"max_bad_fraction={self.max_bad_fraction} is a share: between 0 and 1."
        )
        require(self.num_workers is None or self.num_workers >= 1, f"num_workers={self.num_workers} must be positive.")
        require(2 <= self.num_classes <= 10, f"num_classes={self.num_classes} must be from 2 to 10.")
        require(
            self.num_images >= 4 * self.num_classes,
            f"num_images={self.num_images} must be at least {4 * self.num_classes}, "
            "for one validation picture of every class.",
        )
