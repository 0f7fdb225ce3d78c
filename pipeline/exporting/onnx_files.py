"""ONNX: the network in one file, in fp32 or with weights stored as int8, with what is needed to use it inside.

The metadata of the file holds `squeezewire`, a JSON object: model, metaparameters, input, classes and self-test.
"""

import contextlib
import itertools
import json
import logging
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from torch import Tensor, nn

from pipeline.core.errors import ConfigError
from pipeline.exporting.files import description_of, self_test, test_picture
from pipeline.exporting.judging import Pictures
from pipeline.exporting.quantise import LayerQuantiser
from pipeline.exporting.sensitivity import Sensitivity
from pipeline.models.coded_layers import coded_layers
from pipeline.models.onnx_network import INPUT, METADATA_KEY, OUTPUT, OnnxNetwork, session_of
from pipeline.training.trained import Trained

NUM_COMPARED, MAX_DIFFERENCE = 8, 1e-4
MAX_INT8 = 127
NUM_VALUES_KEPT = 20_000
"""Of an activation, per batch: what its range is chosen by."""
CLIPS = tuple(0.5 + 0.02 * number for number in range(26))
"""Shares of the largest activation that are tried as the end of the range."""
_CLIPPED_ALIKE = frozenset({"MaxPool", "Concat"})
"""Operators whose outputs are their inputs' values: with one scale for all of them, nothing is rounded twice."""


def to_onnx(trained: Trained) -> onnx.ModelProto:
    """Return the network as ONNX, weights in fp32, for batches of any size. Its metadata are still empty.

    Raises:
        ConfigError: torch cannot export this network.
    """
    side = trained.input.size
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own parts, which its users cannot heed
        path = Path(folder, "model.onnx")
        try:
            torch.onnx.export(
                trained.model,
                (torch.zeros(1, 3, side, side),),
                path,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise ConfigError(
                f"{trained.name} cannot be written as ONNX ({_first_line(error)}): leave"
                " onnx and onnx_int8 out of formats=[...]."
            ) from error
        model = onnx.load(path)
    _forget_origin(model)
    onnx.checker.check_model(model, full_check=True)
    return model


def checked(
    model: onnx.ModelProto, trained: Trained, pictures: Pictures | None
) -> tuple[bytes, nn.Module, dict[str, int]]:
    """Return the file of a network in fp32, the network that is read from it, and where its bytes are.

    Args:
        model: As `to_onnx` gives it.
        trained: The network it was made from, whose answers it must give.
        pictures: By whose first ones that is tried; None: by the test picture.

    Raises:
        ConfigError: ONNX Runtime gives other answers.
    """
    content, network, parts = _finish(model, trained)
    images_BCHW = test_picture(trained) if pictures is None else next(pictures.batches(NUM_COMPARED))
    with torch.inference_mode():
        expected_BK, found_BK = trained.model(images_BCHW), network(images_BCHW)
    difference = float((found_BK - expected_BK).abs().max() / expected_BK.abs().max().clamp_min(1e-12))
    if difference > MAX_DIFFERENCE:
        raise ConfigError(
            f"{trained.name} as ONNX gives logits that differ by {difference:.2g} of the largest: ship safetensors."
        )
    return content, network, parts


def _finish(model: onnx.ModelProto, trained: Trained) -> tuple[bytes, nn.Module, dict[str, int]]:
    """Write the metadata; the answer to the test picture is the file's own."""
    draft = OnnxNetwork(session_of(model.SerializeToString()))
    said = {**description_of(trained), "self_test": self_test(draft, trained)}
    onnx.helper.set_model_props(model, {METADATA_KEY: json.dumps(said, sort_keys=True)})
    content = model.SerializeToString()
    stored = storage(model)
    parts = {**stored, "graph": len(content) - sum(stored.values())}
    return content, OnnxNetwork(session_of(content)), parts


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _forget_origin(model: onnx.ModelProto) -> None:
    """Remove what the exporter notes of each node: stack traces with paths of this machine, a fiftieth of the file."""
    del model.graph.metadata_props[:]
    for item in itertools.chain(
        model.graph.node, model.graph.value_info, model.graph.input, model.graph.output, model.graph.initializer
    ):
        del item.metadata_props[:]
        item.doc_string = ""
    del model.graph.value_info[:]


def to_int8(
    model: onnx.ModelProto, trained: Trained, pictures: Pictures, sensitivities: Mapping[str, Sensitivity]
) -> tuple[bytes, nn.Module, dict[str, int]]:
    """Return the file of the network with weights stored as int8 per channel and activations as uint8 per tensor (QDQ).

    The range of an activation is the one that rounds and clips the calibration's values with the least squared error.
    The outputs of both expand layers and their Concat share one range, as do a pooling's sides: three scales around
    each Concat cost SqueezeNet points (ONNX Runtime's own quantiser).

    Args:
        model: As `to_onnx` gives it.
        trained: The network.
        pictures: By which ranges are chosen.
        sensitivities: By which weights are rounded.

    Returns:
        The file, the network that is read from it, and where its bytes are.
    """
    first = next(pictures.batches(1)).numpy()
    overrides = _ranges(model, pictures)
    rounded = onnx.ModelProto()
    rounded.CopyFrom(model)
    overrides |= _round_weights(rounded, trained, sensitivities)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "fp32.onnx"), Path(folder, "int8.onnx")
        onnx.save(rounded, source)
        with _without_advice():
            quantize_static(
                source,
                target,
                _Reader(first),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                extra_options={"TensorQuantOverrides": overrides},
            )
        quantised = onnx.load(target)
    _drop_zero_points_of_biases(quantised)
    onnx.checker.check_model(quantised)
    return _finish(quantised, trained)


def _round_weights(
    model: onnx.ModelProto, trained: Trained, sensitivities: Mapping[str, Sensitivity]
) -> dict[str, list[dict[str, Any]]]:
    """Put weights on int8's grid, errors made up for by others and the bias; returns the grids for the quantiser."""
    stored = {item.name: item for item in model.graph.initializer}
    state, overrides = trained.model.state_dict(), dict[str, list[dict[str, Any]]]()

    def store(name: str, value: Tensor) -> None:
        stored[name].CopyFrom(onnx.numpy_helper.from_array(value.numpy(), name))

    for name, layer in coded_layers(trained.model):
        if f"{name}.weight" not in stored or f"{name}.bias" not in stored:
            continue  # the exporter has folded it into another: the quantiser's own rounding
        largest_R = layer.weight.detach().flatten(1).abs().amax(1).cpu()
        step_R = (largest_R / MAX_INT8).clamp_min(1e-12)
        found = LayerQuantiser(layer.weight, sensitivities.get(name)).quantise(
            0, step=step_R, bounds=(-MAX_INT8, MAX_INT8)
        )
        store(f"{name}.weight", found.weight)
        store(f"{name}.bias", state[f"{name}.bias"].cpu() + found.bias_change)
        zero = np.array(0, np.int8)
        overrides[f"{name}.weight"] = [
            {"axis": 0, "scale": np.array(float(step), np.float32), "zero_point": zero, "quant_type": QuantType.QInt8}
            for step in step_R
        ]
    return overrides


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """Keep the quantiser from advising, through the root logger, what the exporter has done already."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _drop_zero_points_of_biases(model: onnx.ModelProto) -> None:
    """Leave out what a bias may do without: an int32 zero for each of its int32, as many bytes again."""
    zeros = {
        item.name
        for item in model.graph.initializer
        if item.data_type == onnx.TensorProto.INT32 and not onnx.numpy_helper.to_array(item).any()
    }
    dropped = {
        node.input.pop() for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[-1] in zeros
    }
    kept = [item for item in model.graph.initializer if item.name not in dropped]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


class _Reader(CalibrationDataReader):
    """One picture: the quantiser asks for some, and every range is given to it."""

    def __init__(self, images_BCHW: np.ndarray) -> None:
        self._feeds: Iterator[dict[str, np.ndarray]] = iter([{INPUT: images_BCHW}])

    def get_next(self) -> dict[str, np.ndarray] | None:  # type: ignore[override]
        """Return the next picture; None: no more."""
        return next(self._feeds, None)


def _ranges(model: onnx.ModelProto, pictures: Pictures) -> dict[str, list[dict[str, Any]]]:
    """Choose scale and zero point of every activation, as the quantiser wants to be told."""
    group_of = _groups(model)
    values: dict[str, list[np.ndarray]] = {}
    for name, sample in _activations(model, group_of, pictures):
        values.setdefault(group_of[name], []).append(sample)
    chosen = {group: _scale(np.concatenate(samples)) for group, samples in values.items()}
    return {
        name: [{"scale": chosen[group][0], "zero_point": chosen[group][1], "quant_type": QuantType.QUInt8}]
        for name, group in group_of.items()
    }


def _groups(model: onnx.ModelProto) -> dict[str, str]:
    """Map each activation to the one whose range it shares."""
    weights = {item.name for item in model.graph.initializer}
    group_of = {INPUT: INPUT, **{name: name for node in model.graph.node for name in node.output}}
    for node in model.graph.node:
        if node.op_type in _CLIPPED_ALIKE:
            names = [name for name in (*node.input, *node.output) if name not in weights]
            joined = {group_of[name] for name in names}
            group_of = {name: group_of[names[0]] if group in joined else group for name, group in group_of.items()}
    return group_of


def _activations(model: onnx.ModelProto, names: Iterable[str], pictures: Pictures) -> Iterator[tuple[str, np.ndarray]]:
    """Yield some values of every activation of every batch, the extremes among them."""
    told = onnx.ModelProto()
    told.CopyFrom(model)
    names = [name for name in names if name not in (INPUT, OUTPUT)]
    told.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    session = session_of(told.SerializeToString())
    for images in pictures.batches():
        images_BCHW: np.ndarray = images.numpy()
        outputs = [images_BCHW, *session.run([OUTPUT, *names], {INPUT: images_BCHW})]
        for name, output in zip([INPUT, OUTPUT, *names], outputs, strict=True):
            if output.dtype == np.float32:
                flat = output.ravel()
                yield name, np.append(flat[:: max(1, flat.size // NUM_VALUES_KEPT)], [flat.min(), flat.max()])


def _scale(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the scale and zero point of uint8 with the least squared error."""
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    best = (np.inf, 1.0, 0)
    for share in CLIPS:
        scale = max((high - low) * share / 255, 1e-12)
        zero = round(-low * share / scale)
        rounded = (np.clip(np.rint(values / scale) + zero, 0, 255) - zero) * scale
        best = min(best, (float(np.square(rounded - values).mean()), scale, zero))
    return np.array(best[1], np.float32), np.array(best[2], np.uint8)


def storage(model: onnx.ModelProto) -> dict[str, int]:
    """Return the bytes of the weights that a file stores, by their type."""
    found: dict[str, int] = {}
    for item in model.graph.initializer:
        array: np.ndarray = onnx.numpy_helper.to_array(item)
        found[array.dtype.name] = found.get(array.dtype.name, 0) + array.nbytes
    return found
