"""`artefacts.json`: the files that `export` wrote, their bytes, and what each costs in accuracy."""

from typing import Literal, TypedDict


class JudgementJson(TypedDict):
    """An artefact beside the weights it was made from, on the same pictures."""

    num_images: int
    """Number of pictures."""
    num_correct_top1: int
    """Number of pictures whose class has the largest output."""
    num_correct_top5: int
    """Number of pictures whose class is among the five largest outputs."""
    reference_num_correct_top1: int
    """The same of the weights it was made from."""
    loss: float
    """Mean cross-entropy in nats."""
    loss_change: float
    """Mean cross-entropy less that of the weights it was made from."""
    loss_change_standard_error: float | None
    """Of the mean of the paired differences; null: of one picture."""
    agreement: float
    """Fraction of pictures with the same first answer as the weights it was made from."""
    kl_divergence: float
    """From their probabilities to the artefact's, in nats per picture."""
    mcnemar_p: float
    """Probability of as uneven a split of the pictures that one alone has right, if both were as good (exact)."""


class ArtefactJson(TypedDict):
    """One file."""

    artefact: str
    """Kind of the file: safetensors, safetensors_fp16, onnx, onnx_int8, package or delta."""
    file: str
    """Its name in the directory of artefacts.json."""
    num_bytes: int
    """Size of the file."""
    sha256: str
    """Of the file."""
    times_smaller_than_fp32: float
    """Bytes of the weights in fp32, without any header, divided by the file's."""
    times_smaller_than_alexnet_fp32: float
    """The same for AlexNet's weights in fp32."""
    seconds_at_1_mbit: float
    """Bytes x 8 / 10^6: calculated, not measured."""
    seconds_at_60_kbit: float
    """Bytes x 8 / 60,000: calculated, not measured."""
    bytes_by_part: dict[str, int]
    """Where the bytes are; they sum to the file."""
    judged: JudgementJson | None
    """On pictures that nothing was calibrated on, unless `judged_on_calibration` says otherwise."""
    calibrated: JudgementJson | None
    """On the pictures by which it was rounded."""


class ArtefactsJson(TypedDict):
    """`artefacts.json`."""

    schema: Literal[1]
    """Version of this format."""
    checkpoint: str
    """Where the weights come from."""
    model: str
    """Name of the model."""
    num_parameters: int
    """Number of weights and biases."""
    num_zeros: int
    """How many of the coded weights are exactly 0: what a pruning left out."""
    fp32_bytes: int
    """Bytes of all tensors in fp32."""
    bits_per_weight: float | None
    """Of the package, by all its bytes and all parameters; null: none was made."""
    lossless_bytes: int
    """What the coded weights would take without rounding: the entropy of their values, and a table of them."""
    judged_on_calibration: bool
    """Whether the pictures that judge are those by which it was rounded, for want of others."""
    artefacts: list[ArtefactJson]
    """One row per file."""
    null_reasons: dict[str, str]
    """For each null above, by dotted path: why there is no value."""
