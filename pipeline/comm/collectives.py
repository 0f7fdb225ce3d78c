"""What was issued: every collective of the process group, with who asked for it and in which phase of the run.

torch >= 2.14 calls a hook before each operation of a `ProcessGroup`, also for those that DDP's reducer starts in C++,
which no wrapper around `torch.distributed` ever sees. The hook only counts: it never touches a tensor's values.

A meter sees the operations of one group, and not `monitored_barrier`, which bypasses the group's operations.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist

PHASES = ("startup", "train", "validation", "checkpoint")
ORIGINS = ("gradients", "buffers", "parameters", "metrics", "lightning", "other")


class Call(NamedTuple):
    """One collective as issued on this rank: what the ledger counts, and all that a wire formula needs."""

    phase: str
    origin: str
    op: str
    payload_bytes: int
    """Bytes of this rank's input tensors; of the root's whole list for scatter, on every rank."""
    itemsize: int
    """Bytes per element, of which a complex number is two; 1 when there is no tensor."""
    root: int
    """-1 where the operation has none."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """One gradient bucket of DDP: `num_bytes` before any compression."""

    num_bytes: int
    parameters: tuple[str, ...]


class MeterObserver:
    """Whoever is to see what a meter sees as it happens. Override what you need."""

    def issued(self, call: Call) -> None:
        """A collective is being issued, by the calling thread and under the meter's lock: be quick."""

    def phase_changes(self, old: str, new: str) -> None:
        """Phase `old` ends and `new` begins; no collective of this rank is under way."""


class CollectiveMeter:
    """Counts the collectives of the default process group.

    Life: `attach()` after the group exists; from then on every operation is added to `calls`. A world of one exchanges
    nothing, so nothing is recorded there. `enabled=False` never attaches: the switch for measuring the meter itself.

    Threads: gradients are reduced from autograd's threads while the main thread waits in `backward()`. The phase is the
    run's and therefore shared; the origin belongs to whoever issues the operation and is kept per thread. Futures run
    their callbacks in threads of the backend, which know of no origin: what those issue comes from `other`, unless the
    hook whose futures they are has claimed it (`origin(..., claims_callbacks=True)`).

    Args:
        enabled: whether `attach` does anything.
        pinned: NCCL's (algorithm, protocol), where the configuration holds it to one.
        observers: see every call as it is recorded, in order, and every change of phase.
    """

    hook_id: ClassVar[int] = 0x57495245
    """A group has one pre-hook per id: a fixed one makes attaching twice harmless."""

    def __init__(
        self,
        enabled: bool = True,
        *,
        pinned: tuple[str, str] | None = None,
        observers: Sequence[MeterObserver] = (),
    ) -> None:
        self.enabled = enabled
        self.world_size = 1
        self.backend = "none"
        self.pinned = pinned
        self.buckets: dict[int, Bucket] = {}
        """DDP's present buckets by index, filled by the communication hook."""
        self._observers = tuple(observers)
        self._callback_origin = "other"
        self._counts: Counter[Call] = Counter()
        self._gradient_bytes = 0
        self._phase = "startup"
        self._local = _ThreadOrigin()
        self._lock = threading.Lock()
        self._group: dist.ProcessGroup | None = None

    # --- the group ---

    def attach(self, group: dist.ProcessGroup | None = None) -> None:
        """Start recording `group`, by default the default one, which must have been initialised. Idempotent.

        Raises RuntimeError if this torch has no process-group hooks.
        """
        if not dist.is_initialized():
            raise RuntimeError("CollectiveMeter.attach() was called before init_process_group().")
        group = group or dist.group.WORLD
        assert group is not None
        self.world_size, self.backend = group.size(), dist.get_backend(group)
        if not self.enabled or group.size() == 1 or group is self._group:
            return
        if not hasattr(group, "register_pre_hook"):
            raise RuntimeError(f"torch {torch.__version__} cannot report its collectives; torch 2.14 or later can.")
        self.detach()
        group.register_pre_hook(self.hook_id, self._on_collective)
        self._group = group

    def detach(self) -> None:
        """Stop recording; what was recorded stays. Harmless when not attached or when the group is gone."""
        if self._group is not None and dist.is_initialized():
            self._group.unregister_pre_hook(self.hook_id)
        self._group = None

    # --- who and when ---

    @property
    def phase_name(self) -> str:
        """The present phase, one of PHASES."""
        return self._phase

    def set_phase(self, phase: str) -> str:
        """Enter `phase` until further notice; returns the one left."""
        assert phase in PHASES, phase
        previous = self._phase
        if phase != previous:
            for observer in self._observers:
                observer.phase_changes(previous, phase)
        self._phase = phase
        return previous

    @contextmanager
    def phase(self, phase: str) -> Iterator[None]:
        """Operations inside belong to `phase`."""
        previous = self.set_phase(phase)
        try:
            yield
        finally:
            self.set_phase(previous)

    @contextmanager
    def origin(self, origin: str, *, only_if_unknown: bool = False, claims_callbacks: bool = False) -> Iterator[None]:
        """Operations this thread issues inside come from `origin`, the innermost one.

        Args:
            origin: one of ORIGINS.
            only_if_unknown: keep an origin that is already set further out.
            claims_callbacks: from here on, operations of threads that never named an origin come from this one too:
                they run the callbacks of futures that are made inside.
        """
        assert origin in ORIGINS, origin
        if claims_callbacks:
            self._callback_origin = origin
        local = self._local
        previous, local.has_named_one = local.origin, True
        if not (only_if_unknown and previous != "other"):
            local.origin = origin
        try:
            yield
        finally:
            local.origin = previous

    # --- what happened ---

    def record_bucket(self, index: int, num_bytes: int, names: Callable[[], Sequence[str]]) -> None:
        """DDP handed over gradient bucket `index` of `num_bytes`; `names` is asked only when the layout may be new."""
        if self._phase == "train" and self.world_size > 1:  # one rank alone owes nothing
            with self._lock:
                self._gradient_bytes += num_bytes
        known = self.buckets.get(index)
        # DDP rebuilds its buckets during warm-up only; later a change would show in the size.
        if known is None or known.num_bytes != num_bytes or self._phase != "train":
            if index == 0:
                self.buckets.clear()
            self.buckets[index] = Bucket(num_bytes, tuple(names()))

    def take(self) -> "Taken":
        """All that was recorded since the last `take`, which starts anew."""
        with self._lock:
            taken = Taken(self._counts, self._gradient_bytes)
            self._counts, self._gradient_bytes = Counter(), 0
        return taken

    def _on_collective(self, args: Any) -> None:
        op = _OP_NAMES.get(args.name, "unknown")
        inputs, outputs = args.input_tensors, args.output_tensors
        origin = self._local.origin if self._local.has_named_one else self._callback_origin
        calls = [
            Call(self._phase, origin, *issued, args.root)
            for issued in _issued(op, inputs, outputs, self.world_size, self.backend)
        ]
        with self._lock:
            for call in calls:
                self._counts[call] += 1
                for observer in self._observers:
                    observer.issued(call)


@dataclass(frozen=True, slots=True)
class Taken:
    """What a meter recorded over some stretch of the run."""

    calls: Counter[Call]
    gradient_bytes: int
    """Bytes of the gradient buckets DDP handed over in phase `train`, before compression."""


def _issued(
    op: str, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], world_size: int, backend: str
) -> list[tuple[str, int, int]]:
    """(operation, payload bytes, bytes per element) of all that one call of the hook stands for."""
    if op == "scatter":  # only the root has inputs; what arrives is the same everywhere
        return [(op, world_size * _num_bytes(outputs), _itemsize(outputs))]
    if op == "reduce_scatter" and backend == "gloo":  # one operation per tensor (wire.gloo_reduce_scatter)
        return [(op, _num_bytes([tensor]), _itemsize([tensor])) for tensor in inputs]
    if op == "all_to_all" and len(inputs) == 1:  # its splits are not told; the list form has one tensor per rank
        op = "all_to_all_single"
    if any(tensor.is_sparse for tensor in inputs):
        op = f"sparse_{op}"
    return [(op, _num_bytes(inputs), _itemsize(inputs))]


def _num_bytes(tensors: Sequence[torch.Tensor]) -> int:
    return sum(
        tensor._values().nbytes + tensor._indices().nbytes if tensor.is_sparse else tensor.nbytes for tensor in tensors
    )


def _itemsize(tensors: Sequence[torch.Tensor]) -> int:
    if not tensors:
        return 1
    return tensors[-1].itemsize // (2 if tensors[-1].is_complex() else 1)


class _ThreadOrigin(threading.local):
    origin = "other"
    has_named_one = False


def _op_names() -> dict[Any, str]:
    c10d = getattr(torch._C, "_distributed_c10d", None)
    names = getattr(c10d, "HookOpName", None)
    if names is None:
        return {}
    return {
        names.ALLREDUCE: "all_reduce",
        names.BROADCAST: "broadcast",
        names.ALLGATHER: "all_gather",
        names.REDUCE_SCATTER: "reduce_scatter",
        names.REDUCE: "reduce",
        names.GATHER: "gather",
        names.SCATTER: "scatter",
        names.ALLTOALL: "all_to_all",
        names.BARRIER: "barrier",
        names.SEND: "send",
        names.RECV: "recv",
    }


_OP_NAMES = _op_names()
