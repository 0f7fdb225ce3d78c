"""The life of a process group under the meter, as one rank sees it: made, stepped through, ended.

Whatever goes wrong in here must not become the program's: each entry runs inside `guarded`, which tells a fault once
and switches the meter off. Nothing waits for other ranks but rank 0, once when the group is made and once when it ends.
"""

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import torch
from torch.optim import Optimizer

from pipeline.comm.collectives import PHASES
from pipeline.comm.kernel.counter import SocketCounter
from pipeline.comm.kernel.report import RankReport
from pipeline.comm.ledger.attempts import Attempt
from pipeline.comm.ledger.reconcile import ROWS, job_endpoints, reconcile
from pipeline.comm.ledger.traffic import Placement
from pipeline.comm.wire import nccl
from pipeline.core.errors import LedgerError
from pipeline.metering import hosts, origins
from pipeline.metering.account import Account
from pipeline.metering.groups import Group, GroupMeter, backend_of, gathered, server_placement
from pipeline.metering.owed import Owed
from pipeline.metering.posts import Posts, port_of
from pipeline.metering.record import Record, say
from pipeline.metering.settings import Settings

BEGIN_SECONDS = 10.0
"""How long rank 0 waits for the others to say who they are; they have just met."""
END_SECONDS = 20.0
"""How long it waits for their last counts: one may still be writing a checkpoint."""
DYING_SECONDS = 2.0
"""The same, where this rank ends because of an error."""
COMPARED_STEPS = 256
"""The ranks leave their counts after steps 1, 2, 4, ... up to this one, then after each so many."""


class Session:
    """Counts what one rank exchanges from the making of the default group to its end, and lets rank 0 write it down."""

    def __init__(self, settings: Settings, owed: Owed, *, number: int = 1) -> None:
        """Meter for a run; `begin` must follow.

        Args:
            settings: What is metered, and where it is written.
            owed: Knows the program's modules.
            number: Of this group among the default groups that the process has made.
        """
        self._settings, self._owed, self._number = settings, owed, number
        self._groups: list[Group] = []
        self._handles: dict[str, Any] = {}
        self._phase = "startup"
        self._is_phase_told = False
        self._num_calls = 0
        self._num_steps = 0
        self._first_optimizer: int = 0
        self._stepping: Optimizer | None = None
        self._companions: dict[int, dict[str, int]] = {}
        self._posted: str | None = None
        self._num_groups_posted = self._num_groups_matched = 0
        self._is_over = False
        self._seconds = 0.0
        self._lock = threading.Lock()
        self._counter: SocketCounter | None = None
        self._account: Account | None = None
        self.is_off = False
        """Whether a fault has switched the meter off."""

    # --- a fault of ours is not the program's ---

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Time what the meter does inside, and keep its faults from the program."""
        started = time.perf_counter()
        try:
            yield
        except Exception as error:
            if not self.is_off:
                self.is_off = True
                at = traceback.extract_tb(error.__traceback__)[-1]
                say(f"off from here on: {type(error).__name__} at {at.name}:{at.lineno} ({error}).")
        finally:
            self._seconds += time.perf_counter() - started

    @property
    def is_writer(self) -> bool:
        """Whether this rank writes the run down."""
        return self._account is not None

    # --- groups ---

    def begin(self, group: Any, rank: int, num_ranks: int, backend_config: str, store: Any) -> None:
        """Meter the default group, which was just made and is silent. Rank 0 opens the run.

        Args:
            group: torch's group.
            rank: Rank of this process.
            num_ranks: How many ranks there are.
            backend_config: torch's backends by device.
            store: The store at which the ranks met.

        Raises:
            ConfigError: On rank 0, the run cannot be written.
        """
        self._rank, self._num_ranks = rank, num_ranks
        self._posts = Posts(store, rank, num_ranks, self._number)
        if num_ranks > 1:
            counter = SocketCounter(port_of(store))
            self._counter = counter if counter.available else None
        record = Record(self._settings) if rank == 0 else None
        self._posts.post("begin", hosts.hello())
        placement, notes = Placement.assumed(num_ranks), list[str]()
        if record is not None:
            hellos = self._posts.collect("begin", BEGIN_SECONDS)
            placement, notes = hosts.place(hellos, self._settings.placement)
            record.begin(num_ranks, hellos, notes)
        self._placement = placement
        self.add_group("default", group, range(num_ranks), backend_config)
        self._backend = self._groups[0].attempt.backend
        if record is not None:
            self._account = Account(record, self._groups[0], self._owed, is_measured=self._counter is not None)
        if self._settings.notes:
            with open(self._settings.notes, "a") as notes_file:  # noqa: PTH123
                notes_file.write(f"{rank} {num_ranks}\n")

    def add_group(self, name: str, group: Any, ranks: Sequence[int], backend_config: str) -> None:
        """Meter a group that was just made and is silent.

        Args:
            name: torch's name.
            group: torch's group; None: this rank is no member.
            ranks: Its members' ranks in the world.
            backend_config: torch's backends by device.
        """
        backend = backend_of(backend_config)
        placement = server_placement(ranks, self._placement)
        attempt = Attempt(1, 0, placement, backend, _pinned(backend))
        made = Group(name, tuple(ranks), attempt)
        if group is not None:
            made.meter = GroupMeter(self.guarded, self._announce)
            made.meter.set_phase(self._phase)
            try:
                made.meter.watch(group, len(ranks), backend)
            except LedgerError as error:
                made.unpredicted = dict.fromkeys(ROWS, str(error))
                say(str(error))
            self._handles[name] = group
            if self._counter is not None:
                self._counter.adopt_new()
        self._groups.append(made)

    def group_ends(self, group: Any) -> None:
        """Count once more before a group closes its connections; with the default group, everything ends."""
        names = [name for name, handle in self._handles.items() if handle is group]
        if not names or self._is_over:
            return
        if names == ["default"]:
            self.finish()
            return
        self._count()
        for made in self._groups:
            if made.name in names and made.meter is not None:
                made.meter.detach()
        del self._handles[names[0]]

    def _announce(self, origin: str, frame: FrameType | None) -> None:
        """A collective is about to be recorded."""
        self._num_calls += 1
        if self._phase == "startup" and origins.begins_training(origin, frame):
            self.begin_training()

    # --- phases and steps ---

    def set_phase(self, phase: str, *, is_told: bool = False) -> str:
        """Enter a phase; returns the one left. Nothing of this rank may be under way.

        Args:
            phase: One of `PHASES`.
            is_told: Whether the program says so, which from then on decides.
        """
        assert phase in PHASES, phase
        left, self._is_phase_told = self._phase, self._is_phase_told or is_told
        if phase != left and not self._is_over:
            self._count()
            for group in self._groups:
                if group.meter is not None:
                    group.meter.set_phase(phase)
            self._phase = phase
        return left

    def begin_training(self) -> None:
        """The program does what belongs to training, so that start-up is over, unless it names its phases itself."""
        if self._phase == "startup" and not self._is_phase_told:
            self.set_phase("train")

    def _count(self) -> None:
        if self._counter is not None:
            self._counter.end_phase(self._phase)

    def begin_step(self, optimizer: Optimizer) -> None:
        """An optimiser is about to step; one that steps inside another one is part of it."""
        if self._stepping is None:
            self._stepping = optimizer

    def end_step(self, optimizer: Optimizer) -> None:
        """An optimiser has stepped. Optimisers between which nothing is exchanged make one step together."""
        if self._stepping is not optimizer or self._is_over:
            return
        self._stepping = None
        owed = self._owed.of(optimizer)
        if self._num_steps and not self._num_calls and self._num_ranks > 1:
            self._companions[self._first_optimizer].update(owed)
            return
        self._first_optimizer = id(optimizer)
        self._commit(self._companions.setdefault(id(optimizer), dict(owed)))

    def _commit(self, owed: dict[str, int]) -> None:
        if self._phase != "train":
            self._count()
        self._num_calls = 0
        self._num_steps += 1
        calls = [group.commit() for group in self._groups]
        sent = None if self._counter is None else self._counter.commit()
        if self._num_groups_matched != len(self._groups):  # which connections are the ranks' own is not known
            sent = None
        seconds, self._seconds = self._seconds, 0.0
        if self._account is not None:
            self._account.commit(self._groups, calls, owed, sent, seconds)
        step = self._num_steps
        if step % COMPARED_STEPS == 0 or (step < COMPARED_STEPS and step & (step - 1) == 0):
            self._post(f"step{step}")
        self._look_at_posts()
        self.begin_training()
        if self._account is not None:
            self._account.write_if_old(self._groups)

    # --- what the ranks tell one another ---

    def _post(self, tag: str) -> None:
        for group in self._groups:
            group.collect()
        report = None if self._counter is None else self._counter.report().encode()
        mine = [group.pack() for group in self._groups if group.meter is not None]
        self._posts.post(tag, {"step": self._num_steps, "report": report, "groups": mine})
        self._posted, self._num_groups_posted = tag, len(self._groups)

    def _look_at_posts(self) -> None:
        if self._account is not None and self._posted and self._posts.has_all(self._posted):
            self._compare(self._posts.collect(self._posted, 1.0))
            self._posted = None

    def _compare(self, told: Sequence[Any]) -> None:
        """Reconcile what every rank counted, on rank 0."""
        assert self._account is not None
        if any(one is None for one in told):
            silent = [rank for rank, one in enumerate(told) if one is None]
            self._account.not_compared(f"Ranks {silent} left no last count within {END_SECONDS:g} s.")
            return
        groups = gathered({rank: one["groups"] for rank, one in enumerate(told)}, self._placement)
        for group in groups:
            known = next((made for made in self._groups if made.name == group.name), None)
            group.unpredicted |= {} if known is None else known.unpredicted
        step = told[0]["step"]
        if any(one["step"] != step for one in told):
            self._account.not_compared(f"The ranks took {[one['step'] for one in told]} steps.")
            return
        reports = [None if one["report"] is None else RankReport.decode(one["report"]) for one in told]
        known_reports = [report for report in reports if report is not None]
        predicted = self._account.predict(groups)
        if len(known_reports) == self._num_ranks:
            self._account.compared(groups, reconcile(known_reports, predicted, self._placement, step))
            assert self._counter is not None
            self._counter.set_job(job_endpoints(known_reports)[self._rank])
            self._num_groups_matched = self._num_groups_posted

    def finish(self) -> None:
        """The group ends, or the program: leave the last counts, and on rank 0 the ledger. Once is enough."""
        if self._is_over or self.is_off:
            return
        if self._backend == "nccl" and torch.cuda.is_available():
            torch.cuda.synchronize()  # what is under way ends here anyway
        self._count()
        is_dying = sys.exc_info()[1] is not None or getattr(sys, "last_value", None) is not None
        self._is_over = True
        if self._account is not None:
            self._account.write(self._groups)
        self._post("end")
        if self._account is not None:
            if self._num_ranks > 1:
                self._compare(self._posts.collect("end", DYING_SECONDS if is_dying else END_SECONDS))
            self._account.close(self._groups, is_dying=is_dying)
        for group in self._groups:
            if group.meter is not None:
                group.meter.detach()


def _pinned(backend: str) -> tuple[str, str] | None:
    """Return NCCL's (algorithm, protocol) where the program's environment holds it to one way, else None."""
    if backend != "nccl":
        return None
    for algorithm in nccl.ALGORITHMS:
        for protocol in nccl.PROTOCOLS:
            wanted = nccl.environment(algorithm, protocol)
            if all(os.environ.get(name) == value for name, value in wanted.items()):
                return algorithm, protocol
    return None
