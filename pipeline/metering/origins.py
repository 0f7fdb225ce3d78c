"""Who asked for a collective, read from the calling stack: no program has to say it.

The hook of a process group runs in the thread that issues the operation, so the Python functions above it are those
that asked. DDP's reducer works in C++ inside the backward pass: above it is autograd's engine, or nothing at all.
"""

from types import CodeType, FrameType

GRADIENTS, BUFFERS, PARAMETERS = "gradients", "buffers", "parameters"
UNUSED_PARAMETERS = "find_unused_parameters"
"""The bitmap of used parameters, which DDP's reducer adds up beside the gradients: the only integers it sends."""

BUCKETS = "buckets"
"""Which parameters are in which bucket of DDP, which its first rank tells the others once."""
JOIN = "join"
"""torch's `Join`: which ranks still have batches."""

_PASSED = (
    "contextlib",
    "functools",
    f"{__name__.partition('.')[0]}.comm.",
    f"{__name__.partition('.')[0]}.metering.",
    "torch._ops",
    "torch.autograd.function",
    "torch.distributed._functional_collectives",
    "torch.distributed.c10d_logger",
    "torch.distributed.distributed_c10d",
    "torch.utils._contextlib",
    "typing_extensions",
)
"""Modules, or what their names begin with, that pass a call on for somebody."""

_ASKERS = (
    ("torch.autograd.graph", "_engine_run_backward", GRADIENTS),
    ("torch.distributed.algorithms.ddp_comm_hooks.", "", GRADIENTS),
    ("torch.distributed.algorithms.join", "", JOIN),
    ("torch.distributed.algorithms.model_averaging.", "", PARAMETERS),
    ("torch.distributed.fsdp.", "foreach_reduce", GRADIENTS),
    ("torch.distributed.fsdp.", "_reduce_grad", GRADIENTS),
    ("torch.distributed.fsdp.", "all_gather", PARAMETERS),
    ("torch.distributed.fsdp.", "_all_gather", PARAMETERS),
    ("torch.distributed.fsdp.", "foreach_all_gather", PARAMETERS),
    ("torch.distributed.fsdp.", "_sync_params_and_buffers", PARAMETERS),
    ("torch.distributed.optim.", "", PARAMETERS),
    ("torch.distributed.utils", "_verify_param_shape_across_processes", PARAMETERS),
    ("torch.nn.modules._functions", "", BUFFERS),  # statistics of SyncBatchNorm
    ("torch.nn.parallel.distributed", "__init__", PARAMETERS),
    ("torch.nn.parallel.distributed", "_pre_forward", BUCKETS),
    ("torch.nn.parallel.distributed", "_sync_final_model", PARAMETERS),
    ("torch.nn.parallel.distributed", "_sync_module_buffers", BUFFERS),
    ("torchmetrics.", "", "metrics"),
    ("lightning.", "", "lightning"),
    ("lightning_fabric.", "", "lightning"),
    ("pytorch_lightning.", "", "lightning"),
)
"""(module or the beginning of its name, beginning of the function's name, origin), first match first."""

_TRAINING = (GRADIENTS, BUFFERS)


def origin_of(frame: FrameType | None, *, is_integer: bool, is_backward: bool = True) -> str:
    """Return who asked for a collective: one of `comm.collectives.ORIGINS`, or `module.function` of the program.

    The innermost function that is known decides; within a backward pass a function of the program is a hook on
    gradients. Where nothing is known, it is the innermost function that does more than pass the call on.

    Args:
        frame: Innermost Python frame; None in a thread of C++ alone.
        is_integer: Whether whole numbers travel, which no gradients are.
        is_backward: Whether autograd's engine may be further up: else the program's own function ends the search.
    """
    first, is_of_program = "", False
    while frame is not None:
        asker = _asker(frame)
        if asker is not None:
            name, is_origin = asker
            if is_origin and (name == GRADIENTS or not is_of_program):
                return _gradients(is_integer) if name == GRADIENTS and not first else name
            first = first or name
            is_of_program = is_of_program or not name.startswith("torch.")
            if is_of_program and not is_backward:
                return first
        frame = frame.f_back
    return first or _gradients(is_integer)


def begins_training(origin: str, frame: FrameType | None) -> bool:
    """Tell whether such a collective belongs to a training step, so that start-up is over."""
    if origin in _TRAINING:
        return True
    while frame is not None and origin == PARAMETERS:  # FSDP gathers them in each forward pass
        if frame.f_globals.get("__name__", "").startswith("torch.distributed.fsdp.") and "all_gather" in (
            frame.f_code.co_name
        ):
            return True
        frame = frame.f_back
    return False


def _gradients(is_integer: bool) -> str:
    return UNUSED_PARAMETERS if is_integer else GRADIENTS


_known: dict[CodeType, tuple[str, bool] | None] = {}


def _asker(frame: FrameType) -> tuple[str, bool] | None:
    """Return (origin or name, whether it is an origin) of a function; None where it passes calls on."""
    code = frame.f_code
    if code not in _known:
        _known[code] = _classify(str(frame.f_globals.get("__name__", "")), code)
    return _known[code]


def _classify(module: str, code: CodeType) -> tuple[str, bool] | None:
    if module.startswith(_PASSED):
        return None
    for where, function, origin in _ASKERS:
        if module.startswith(where) and code.co_name.startswith(function):
            return origin, True
    return f"{module}.{code.co_qualname.replace('<locals>.', '')}", False
