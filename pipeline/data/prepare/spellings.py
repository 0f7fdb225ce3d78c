"""Names that people write in several ways: those of splits, those of classes, those that stand for no class."""

import re
import unicodedata

_SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev", "eval", "evaluation"),
    "test": ("test", "testing"),
}
SPLIT_ASKED_FOR = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "val"}
"""What `split=` means where no split has that name."""
_SPLIT_OF_WORD = {word: split for split, words in _SPLITS.items() for word in words}
_WORDS_BESIDE = frozenset(("set", "split", "data", "dataset", "images", "imgs", "seg", "folder"))
"""What may stand beside a split's word in the name of its folder: training_set, train2017, test_images."""
_NO_CLASS = frozenset(
    (
        *("images", "image", "imgs", "img", "pictures", "photos", "jpegs", "jpegimages"),
        *("unlabeled", "unlabelled", "unsup"),
    )
)


def split_word(name: str) -> str | None:
    """`train`, `val` or `test` if a folder of this name is that split by its spelling."""
    words = [word for word in re.split(r"[\W\d_]+", name.casefold()) if word and word not in _WORDS_BESIDE]
    return _SPLIT_OF_WORD.get(words[0].removesuffix("set")) if len(words) == 1 else None


def is_no_class(name: str) -> bool:
    """Whether a folder of this name holds pictures of any class."""
    return name.casefold() in _NO_CLASS


def spelling(name: str) -> str:
    """Equal for names that people take for one: in another case, another Unicode form, with other blanks."""
    return " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold()).split())
