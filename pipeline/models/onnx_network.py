"""ONNX files as networks: run by ONNX Runtime, judged and used as any other."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

INPUT, OUTPUT, METADATA_KEY = "images", "logits", "squeezewire"


def session_of(model: bytes | Path, *, num_threads: int = 0) -> onnxruntime.InferenceSession:
    """Open an ONNX file on the CPU.

    Args:
        model: Content of the file, or its path.
        num_threads: 0: as many as there are cores.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = num_threads, 3
    content = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def description_of(session: onnxruntime.InferenceSession) -> dict[str, Any] | None:
    """Return what `export` wrote into the file; None: it is another's."""
    told = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    return None if told is None else json.loads(told)


class OnnxNetwork(nn.Module):
    """An ONNX file as a module: pictures to logits, on the CPU."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        super().__init__()
        self._session = session
        # What asks a network for its device looks at its parameters.
        self.device_mark = nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, K)."""
        feed = {self._session.get_inputs()[0].name: np.ascontiguousarray(images_BCHW.cpu().numpy())}
        (logits_BK,) = self._session.run(None, feed)
        return torch.from_numpy(np.asarray(logits_BK))
