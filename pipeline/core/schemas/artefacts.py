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


class OnnxRunJson(TypedDict):
    """An ONNX file in ONNX Runtime, for one picture on one thread, in a process of its own."""

    activation_peak_bytes: int
    """Most bytes that operators had asked for at once, by the runtime's own account."""
    process_peak_bytes: int
    """What the process grew by at most: weights, their packed copies, activations and workspaces."""
    p50_seconds: float | None
    """Median of the windows' medians; null: latency was not measured."""
    p90_seconds: float | None
    """Median of the windows' 90th percentiles; null: latency was not measured."""
    num_windows: int
    """Number of windows."""
    window_seconds: float
    """Length of each, at least."""


class PeakJson(TypedDict):
    """The most activations alive at once."""

    num_elements: int
    """Of one picture: bytes in int8, a quarter of the bytes in fp32."""
    module: str
    """Path of the module that is running then."""


class PeaksJson(TypedDict):
    """By plan of where they lie. ReLU, batch normalisation and additions replace what they read in all of them."""

    copied: PeakJson
    """A Concat copies its inputs."""
    in_place: PeakJson
    """The inputs of a Concat are written to where its output lies; a depthwise convolution replaces its input."""
    streamed: PeakJson | None
    """As in_place, and the first convolution and pooling go by rows; null: they do not follow one another."""


class FitJson(TypedDict):
    """A class of hardware, and a number format."""

    hardware: str
    """The class."""
    memory_bytes: int
    """Its memory."""
    number_format: str
    """`fp32` or `int8`, of weights and activations."""
    weights_bytes: int
    """Of all parameters in that format."""
    are_weights_in_it: bool
    """Whether they have to lie in that memory too, or are read from flash."""
    plan: str | None
    """The plan, of those above the one that asks least of whoever writes the code, by which it fits; null: none."""


class MemoryJson(TypedDict):
    """What one picture's answer takes, calculated. Code and workspaces are not in it."""

    image_size: int
    """Side of the picture in pixels."""
    activations: PeaksJson
    """Of this model."""
    alexnet_activations: PeaksJson
    """Of AlexNet, 224x224 pixels: the paper's yardstick for weights."""
    fits: list[FitJson]
    """Whether it fits."""


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
    onnx_run: OnnxRunJson | None
    """Of ONNX files: what ONNX Runtime takes to answer one picture on this machine."""


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
    memory: MemoryJson
    """Whether weights and activations fit small hardware."""
    cpu_model: str
    """The processor on which `onnx_run` was measured: compare latencies of one processor alone."""
    cpu_flags: list[str]
    """Those of its instruction sets that matter here."""
    artefacts: list[ArtefactJson]
    """One row per file."""
    null_reasons: dict[str, str]
    """For each null above, by dotted path: why there is no value."""
