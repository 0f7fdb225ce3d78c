"""State dicts as others save them: taken out of what they are packed in, and it is said out of what."""

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor

KEYS = ("state_dict", "model_state_dict", "model", "net", "weights")
"""Where a checkpoint keeps its weights: Lightning and torch's examples, its tutorials, torchvision's references."""
PREFIXES = ("module.", "_orig_mod.", "model.")
"""What DistributedDataParallel and AveragedModel, torch.compile, and Lightning put before every name."""
COUNTER = "n_averaged"  # beside the weights of an AveragedModel


def unwrap(content: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the weights under the model's own names, and a clause for each wrapper that was taken off."""
    said: list[str] = []
    while (key := next((key for key in KEYS if isinstance(content.get(key), Mapping)), None)) is not None:
        others = sorted(str(name) for name, value in content.items() if name != key and isinstance(value, Mapping))
        unread = f" ({', '.join(others)} not read)" if others else ""
        said.append(f"from its key {key!r}{unread}")
        content = cast(Mapping[str, Any], content[key])
    state = {name: value for name, value in content.items() if name != COUNTER}
    while (prefix := next((prefix for prefix in PREFIXES if _all_begin_with(state, prefix)), None)) is not None:
        said.append(f"names without {prefix!r}")
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state, said


def _all_begin_with(state: Mapping[str, object], prefix: str) -> bool:
    return bool(state) and all(isinstance(name, str) and name.startswith(prefix) for name in state)
