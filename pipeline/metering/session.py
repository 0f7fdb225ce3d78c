"""The life of a process group under the meter, as one rank sees it: made, stepped through, ended.

Whatever goes wrong in here must not become the program's: each entry runs inside `guarded`, which tells a fault once
and switches the meter off. Nothing waits for other ranks but rank 0, once when the group is made and once when all is
over. With the group dies what was held of it: a program may make the next one at the same address.
"""

import contextlib
import itertools
import threading
import time
import traceback
import weakref
from collections.abc import Iterable, Iterator, Sequence
from types import FrameType
from typing import Any

from torch.optim import Optimizer

from pipeline.comm.collectives import PHASES
from pipeline.comm.kernel.counter import SocketCounter
from pipeline.comm.kernel.report import RankReport
from pipeline.comm.ledger.attempts import Attempt
from pipeline.comm.ledger.reconcile import ROWS, job_endpoints, reconcile
from pipeline.comm.ledger.traffic import Placement
from pipeline.core.errors import ConfigError, LedgerError
from pipeline.metering import hosts, origins
from pipeline.metering.account import Account
from pipeline.metering.groups import Group, GroupMeter, backend_of, gathered, server_placement
from pipeline.metering.owed import Owed
from pipeline.metering.posts import BEGIN_SECONDS, Posts, may_host, port_of
from pipeline.metering.process import connects_late, is_active, is_dying, note, pinned, wait_for_cards
from pipeline.metering.record import Record, say
from pipeline.metering.settings import Settings

END_SECONDS = 20.0
"""How long it waits for their last counts: one may still be writing a checkpoint."""
DYING_SECONDS = 2.0
"""The same, where this rank ends because of an error."""
CONNECTS_LATE = (
    "TORCH_GLOO_LAZY_INIT=1 lets gloo connect with its first collective, and what that sends is no collective's."
)
FIRST_SECONDS = 2.0
"""How long the others let rank 0 end its group first, whose store they would else meet at for the next one."""
COMPARED_STEPS = 256
"""The ranks leave their counts after steps 1, 2, 4, ... up to this one, then after each so many."""

_numbers = itertools.count(1)
"""Of the sessions of a process, the same on all ranks: two meters may watch one group."""


class Session:
    """Counts what one rank exchanges from the making of the default group to its end, and lets rank 0 write it down."""

    def __init__(self, settings: Settings, owed: Owed, store_ports: Iterable[int] = ()) -> None:
        """Meter for a run; `begin` must follow.

        Args:
            settings: What is metered, and where it is written.
            owed: Knows the program's modules.
            store_ports: Ports of the stores that the program has made for itself.
        """
        self._settings, self._owed, self._store_ports = settings, owed, tuple(store_ports)
        self._groups: list[Group] = []
        self._handles: dict[str, Any] = {}
        self._phase = "startup"
        self._is_phase_told = False
        self._num_calls = 0
        self._num_steps = 0
        self._stepping: tuple[Optimizer, FrameType] | None = None
        self._round: list[weakref.ref[Optimizer]] = []
        self._rounds: weakref.WeakKeyDictionary[Optimizer, list[weakref.ref[Optimizer]]] = weakref.WeakKeyDictionary()
        self._posts: Posts | None = None
        self._posted: str | None = None
        self._num_groups_posted = self._num_groups_matched = 0
        self._silent: set[str] = set()
        self._is_over = self._is_dying = False
        self._seconds = 0.0
        self._entered = threading.local()
        self._counter: SocketCounter | None = None
        self._account: Account | None = None
        self.is_off = False
        """Whether a fault has switched the meter off."""

    # --- a fault of ours is not the program's ---

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Time what the meter does inside, and keep its faults from the program."""
        if getattr(self._entered, "at", None) is not None:  # inside another one, which sees to it
            yield
            return
        self._entered.at = time.perf_counter()
        try:
            yield
        except Exception as error:
            if not self.is_off:
                self.is_off = True
                for group in self._groups:
                    if group.meter is not None:
                        group.meter.enabled = False
                at = traceback.extract_tb(error.__traceback__)[-1]
                say(f"off from here on: {type(error).__name__} at {at.name}:{at.lineno} ({error}).")
        finally:
            self._seconds += time.perf_counter() - self._entered.at
            self._entered.at = None

    def _take_seconds(self) -> tuple[float, float]:
        """Return the present time, and the meter's own seconds up to it since the last call."""
        now, entered = time.perf_counter(), self._entered.at
        own, self._seconds, self._entered.at = self._seconds + now - entered, 0.0, now
        return now, own

    @property
    def is_on(self) -> bool:
        """Whether what the program does is still metered."""
        return not (self.is_off or self._is_over)

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
            ConfigError: On rank 0, the run cannot be written; elsewhere, rank 0 is not metered.
            RefusedError: On another rank, rank 0 cannot write the run.
        """
        self._rank, self._num_ranks = rank, num_ranks
        self._is_wait_harmless = not may_host(store)
        number = next(_numbers)
        if num_ranks > 1:
            counter = SocketCounter(port_of(store), *self._store_ports)
            self._counter = counter if counter.available else None
        try:
            record = Record(self._settings) if rank == 0 else None
        except ConfigError:
            Posts.refuse(store, number)
            raise
        self._posts = Posts(store, rank, num_ranks, number)
        self.ignore_store(self._posts.port)
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
        note(self._settings.notes, f"{rank} {num_ranks}\n")

    def ignore_store(self, port: int) -> None:
        """Connections to this port are a store's, whoever made it: what they carry is no collective's."""
        if self._counter is not None:
            self._counter.store_ports.add(port)

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
        attempt = Attempt(1, 0, placement, backend, pinned(backend))
        made = Group(name, tuple(ranks), attempt)
        if group is not None:
            if connects_late(backend):
                made.unpredicted = dict.fromkeys(ROWS, CONNECTS_LATE)
            made.meter = GroupMeter(self.guarded, self._announce)
            made.meter.set_phase(self._phase)
            try:
                made.meter.watch(group, len(ranks), backend)
            except LedgerError as error:
                made.unpredicted = dict.fromkeys(ROWS, str(error))
                say(str(error))
            self._handles[name] = group
            self._silent.add(name)
            if self._counter is not None:
                self._counter.adopt_new()
        self._groups.append(made)

    def group_ends(self, group: Any) -> None:
        """Count once more before a group closes its connections; with the default group, everything ends.

        Where this process holds the program's store, nothing is waited for: the others may be on their way to the next
        group, and would meet at the old store.
        """
        names = [name for name, handle in self._handles.items() if handle is group]
        if not names:
            return
        if names == ["default"]:
            self.leave(first_seconds=0.0 if self._is_wait_harmless else FIRST_SECONDS)
            if self._is_wait_harmless:
                self.conclude()
            return
        self._count()
        for made in self._groups:
            if made.name in names and made.meter is not None:
                made.meter.detach()
        del self._handles[names[0]]

    def passes_by(self, group: Any, op: str) -> None:
        """A group is about to do something that its hook is not told of."""
        names = {name for name, handle in self._handles.items() if handle is group}
        for made in self._groups:
            if made.name in names and made.meter is not None:
                made.meter.passes_by(op)

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

    def begin_step(self, optimizer: Optimizer, frame: FrameType) -> None:
        """An optimiser is about to step; one that steps inside another one is part of it.

        Args:
            optimizer: The optimiser.
            frame: The call of its step. One that ended in an exception is on the stack no more.
        """
        if self._stepping is None or not is_active(self._stepping[1]):
            self._stepping = optimizer, frame

    def end_step(self, optimizer: Optimizer) -> None:
        """An optimiser has stepped. Optimisers between which nothing is exchanged make one step together."""
        if self._stepping is None or self._stepping[0] is not optimizer:
            return
        self._stepping = None
        if self._num_steps and not self._num_calls and self._num_ranks > 1:
            if all(one() is not optimizer for one in self._round):
                self._round.append(weakref.ref(optimizer))
            if self._account is not None:
                self._account.owe(self._owed.of(_living(self._round)))
            return
        companions = [one for one in _living(self._rounds.get(optimizer, ())) if one is not optimizer]
        self._round = self._rounds[optimizer] = [weakref.ref(optimizer)]
        self._commit(self._owed.of([optimizer, *companions]))

    def _commit(self, owed: dict[str, int]) -> None:
        if self._phase != "train":
            self._count()
        self._num_calls = 0
        self._num_steps += 1
        calls = [group.commit() for group in self._groups]
        speaks = {group.name for group, found in zip(self._groups, calls, strict=True) if found}
        if self._counter is not None and self._silent & speaks:
            self._counter.find_new()  # of a backend that connects when it has something to say
        self._silent -= speaks
        sent = None if self._counter is None else self._counter.commit()
        if self._num_groups_matched != len(self._groups):  # which connections are the ranks' own is not known
            sent = None
        now, own_seconds = self._take_seconds()
        if self._account is not None:
            self._account.commit(self._groups, calls, owed, sent, now=now, own_seconds=own_seconds)
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
        assert self._posts is not None
        report = None if self._counter is None else self._counter.report().encode()
        mine = [group.pack() for group in self._groups if group.meter is not None]
        self._posts.post(tag, {"step": self._num_steps, "report": report, "groups": mine})
        self._posted, self._num_groups_posted = tag, len(self._groups)

    def _look_at_posts(self) -> None:
        if self._account is not None and self._posts and self._posted and self._posts.has_all(self._posted):
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

    def leave(self, *, first_seconds: float = 0.0) -> None:
        """The group ends, or the program: leave the last counts, and hold on to nothing of the group.

        Args:
            first_seconds: How long rank 0 may take to do so first.
        """
        if self._is_over or self._posts is None:
            return
        self._is_over, self._is_dying = True, is_dying()
        try:
            if self.is_off:
                self._posts.post("end", None)
                return
            if self._backend == "nccl" and not self._is_dying:
                wait_for_cards(END_SECONDS)
            self._count()
            self._post("end")
            if first_seconds:
                self._posts.let_go(first_seconds)
        finally:
            for group in self._groups:
                if group.meter is not None:
                    group.meter.detach()
            self._handles.clear()
            if self._account is None:
                self._posts = None

    def conclude(self) -> None:
        """Compare the last counts on rank 0, once every rank has left, and end the record."""
        posts, self._posts = self._posts, None
        if posts is None or self._account is None:
            return
        if self.is_off:
            self._account.abandon()
            return
        self._account.write(self._groups)  # should somebody lose patience with the wait
        if self._num_ranks > 1:
            self._compare(posts.collect("end", DYING_SECONDS if self._is_dying else END_SECONDS))
        self._account.close(self._groups, is_dying=self._is_dying)


def _living(references: Iterable[weakref.ref[Optimizer]]) -> list[Optimizer]:
    return [optimizer for reference in references if (optimizer := reference()) is not None]
