"""Other people's loaders and a bare decoder, as contenders of `benchmarks.loader`; a program of its own.

    python loaders.py write CONTENDER FOLDER OUT      the pictures of FOLDER/<class>/ in the contender's own format
    python loaders.py serve CONTENDER SOURCE BATCH    one epoch for every line on stdin, each answered by a line of JSON

It imports nothing of ours, because litData, MosaicML Streaming and DALI live in an environment of their own
(requirements.txt beside this file). Every contender shuffles, cuts by RandomResizedCrop(224), mirrors at random, and
hands out uint8 batches with labels from one process. Where a library leaves decoding to its user, it is torchvision's
decode_jpeg followed by torchvision's transforms v2 on the uint8 tensor: the fastest that its users have at hand.
"""

import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SIZE, SCALE, RATIO = 224, (0.08, 1.0), (3 / 4, 4 / 3)
CHUNK_BYTES = 64_000_000
Epochs = Callable[[], Iterator[Any]]
"""Called once per epoch: its batches."""


def cut_and_mirror() -> Any:
    """RandomResizedCrop and flip, torchvision v2, for tensors."""
    from torchvision.transforms import v2

    return v2.Compose([v2.RandomResizedCrop(SIZE, SCALE, RATIO, antialias=True), v2.RandomHorizontalFlip()])


def decoder_of_bytes() -> Callable[[bytes], Any]:
    """bytes of a JPEG -> uint8 (3, 224, 224)."""
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    transform = cut_and_mirror()
    return lambda jpeg: transform(decode_jpeg(torch.frombuffer(bytearray(jpeg), dtype=torch.uint8), ImageReadMode.RGB))


def image_folder(source: str, batch: int) -> Epochs:
    """torchvision: ImageFolder, Pillow, transforms on Pillow's pictures."""
    from torch.utils.data import DataLoader
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    transform = transforms.Compose(
        [transforms.RandomResizedCrop(SIZE, SCALE, RATIO), transforms.RandomHorizontalFlip(), transforms.PILToTensor()]
    )
    loader: Any = DataLoader(ImageFolder(source, transform), batch, shuffle=True, num_workers=0)
    return lambda: iter(loader)


def webdataset(source: str, batch: int) -> Epochs:
    """webdataset over tars, its shuffle buffer of 1000."""
    from webdataset.compat import WebDataset, WebLoader

    decode = decoder_of_bytes()
    tars = sorted(str(path) for path in Path(source).glob("train-*.tar"))
    data = WebDataset(tars, shardshuffle=len(tars), empty_check=False).shuffle(1000)
    data = data.to_tuple("jpg", "cls").map_tuple(decode, int)
    loader = WebLoader(data, batch_size=batch, num_workers=0)
    return lambda: iter(loader)


def litdata(source: str, batch: int) -> Epochs:
    """litData's StreamingDataset over chunks made by `optimize`."""
    import litdata as ld  # pyright: ignore[reportMissingImports]

    decode = decoder_of_bytes()

    class Pictures(ld.StreamingDataset):
        def __getitem__(self, index: Any) -> Any:
            sample = super().__getitem__(index)
            return decode(sample["image"]), sample["label"]

    loader = ld.StreamingDataLoader(Pictures(source, shuffle=True), batch_size=batch, num_workers=0)
    return lambda: iter(loader)


def mosaic(source: str, batch: int) -> Epochs:
    """MosaicML's StreamingDataset over MDS shards."""
    from streaming import StreamingDataset  # pyright: ignore[reportMissingImports]
    from torch.utils.data import DataLoader

    decode = decoder_of_bytes()

    class Pictures(StreamingDataset):
        def __getitem__(self, index: Any) -> Any:
            sample = super().__getitem__(index)
            return decode(sample["image"]), sample["label"]

    loader: Any = DataLoader(Pictures(local=source, shuffle=True, batch_size=batch), batch, num_workers=0)
    return lambda: iter(loader)


def dali(source: str, batch: int) -> Epochs:
    """DALI without a GPU: its decoder that decodes only the crop, one thread, nothing made ahead of the rounds."""
    import numpy as np
    from nvidia.dali import fn, pipeline_def, types  # pyright: ignore[reportMissingImports]

    @pipeline_def(batch_size=batch, num_threads=1, device_id=None, seed=0, exec_async=False, exec_pipelined=False)
    def pictures() -> Any:
        content, labels = fn.readers.file(file_root=source, random_shuffle=True, name="reader")
        images = fn.decoders.image_random_crop(
            content, device="cpu", output_type=types.RGB, random_area=list(SCALE), random_aspect_ratio=list(RATIO)
        )
        images = fn.resize(images, size=(SIZE, SIZE), interp_type=types.INTERP_LINEAR, antialias=True)
        return fn.flip(images, horizontal=fn.random.coin_flip(probability=0.5)), labels

    pipeline = pictures()
    pipeline.build()
    steps = pipeline.epoch_size("reader") // batch

    def epoch() -> Iterator[Any]:
        for _ in range(steps):
            images, labels = pipeline.run()
            yield np.asarray(images.as_tensor()), np.asarray(labels.as_tensor())

    return epoch


def decoder(source: str, batch: int) -> Epochs:
    """No loader: simplejpeg, whole pictures at full size as RGB into new memory, from bytes that lie in memory."""
    import simplejpeg

    del batch  # none: a picture's memory is free again for the next one
    pictures = [path.read_bytes() for path in sorted(Path(source).glob("*/*"))]
    return lambda: (([simplejpeg.decode_jpeg(jpeg)], None) for jpeg in pictures)


CONTENDERS = {made.__name__: made for made in (image_folder, webdataset, litdata, mosaic, dali, decoder)}
PACKAGES = ("torch", "torchvision", "webdataset", "litdata", "mosaicml-streaming", "nvidia-dali-cuda130", "simplejpeg")


def as_litdata(item: tuple[str, int]) -> dict[str, Any]:
    """A sample of litData's; at module level, for its processes."""
    return {"image": Path(item[0]).read_bytes(), "label": item[1]}


def write(contender: str, folder: str, out: str) -> None:
    """The original bytes and class numbers, one process."""
    classes = sorted(path.name for path in Path(folder).iterdir())
    items = [(str(p), label) for label, name in enumerate(classes) for p in sorted(Path(folder, name).iterdir())]
    if contender == "litdata":
        import litdata as ld  # pyright: ignore[reportMissingImports]

        ld.optimize(as_litdata, items, out, chunk_bytes=CHUNK_BYTES, num_workers=1)
        return
    assert contender == "mosaic", contender
    from streaming import MDSWriter  # pyright: ignore[reportMissingImports]

    with MDSWriter(out=out, columns={"image": "bytes", "label": "int"}, size_limit=CHUNK_BYTES) as writer:
        for item in items:
            writer.write(as_litdata(item))


def versions() -> dict[str, str]:
    """Of what is installed here."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def timed_epoch(epochs: Epochs) -> dict[str, Any]:
    """Seconds of an epoch, from asking for its iterator to its last batch, and what it handed out."""
    num_images, last = 0, None
    started = time.perf_counter()
    for batch in epochs():
        last = batch[0]
        num_images += len(last)
    seconds = time.perf_counter() - started
    shape = [*getattr(last, "shape", [])]
    return {"seconds": seconds, "images": num_images, "shape": shape, "dtype": str(getattr(last, "dtype", None))}


def serve(epochs: Epochs, told: dict[str, str]) -> None:
    """Answer until stdin ends. What libraries print goes to stderr: stdout is for the answers alone."""
    answers, sys.stdout = sys.stdout, sys.stderr
    print(json.dumps(told), file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(timed_epoch(epochs)), file=answers, flush=True)


def main(arguments: list[str]) -> None:
    """See above."""
    if arguments[0] == "write":
        write(*arguments[1:])
        return
    _, contender, source, batch = arguments
    if contender != "dali":
        import torch

        torch.set_num_threads(1)
    serve(CONTENDERS[contender](source, int(batch)), versions())


if __name__ == "__main__":
    main(sys.argv[1:])
