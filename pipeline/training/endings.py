"""How ranks end that do not end well together: each says why, and finds out why another one has.

A rank that fails leaves its reason in the ranks' store before its connections break, so that those which lose it can
name it, and end with its exit code. One that was killed leaves nothing: then the store has its last will, which says
that its connection is gone. Where there is neither, the network is asked which addresses do not answer.

The store is rank 0's and ends with it. So that rank, where nobody above it collects the reasons, breaks its connections
first and ends last.
"""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

from pipeline.comm.kernel.counter import SocketCounter
from pipeline.comm.kernel.sockets import own_connections
from pipeline.core.errors import ExitCode, PeerLost, Preempted
from pipeline.core.exits import are_causes_collected, code_of
from pipeline.core.text import shortened
from pipeline.run.launch.network import Place, tell
from pipeline.run.launch.preempt import StopRequest
from pipeline.run.launch.ranks import RankInfo
from pipeline.training.lost_peers import cause_of, gist_of, is_of_a_lost_peer
from pipeline.training.meeting import LAST_WORDS_SECONDS, Meeting, gone_key
from pipeline.training.store import FAILED_KEY

LOOK_SECONDS = 3.0
"""For the word of a rank to arrive in the store: its connections break one after another."""
ANSWER_SECONDS = 2.0
"""The store's patience with a question, once a rank is lost."""
PAUSE_SECONDS = 0.05
LONGEST_REASON = 1000
WATCH_SECONDS = 1.0
"""Between two looks at which addresses do not answer."""


class Endings:
    """The end of this rank and of the others.

    Args:
        ranks: The place of this process among all.
        meeting: Where they have met.
        counter: Knows this rank's connections; None: nothing counts them.
        stop: Whether a signal asked this rank to stop, or suspended it.
    """

    def __init__(self, ranks: RankInfo, meeting: Meeting, counter: SocketCounter | None, stop: StopRequest) -> None:
        self._ranks, self._counter, self._stop, self._port = ranks, counter, stop, meeting.port
        self._store: Store = meeting.store
        self._places: Sequence[Place] = meeting.places
        self._is_over = threading.Event()

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """What ends the block is told to the other ranks; how they are lost, in a sentence that names who is gone.

        Raises:
            PeerLost: In place of torch's own report, which is long and names no cause.
            Preempted: The same, after a signal that asked to stop, where no rank says why it ended: it was not as
                patient. Or after this rank was suspended.
        """
        if self._ranks.world_size == 1:
            yield
            return
        threading.Thread(target=self._watch, name="addresses", daemon=True).start()
        try:
            yield
        except BaseException as error:
            lost = None
            if isinstance(error, RuntimeError) and is_of_a_lost_peer(error):
                lost = self._explain(error)
            self._leave(lost or error)
            if lost is None:
                raise
            raise lost from error
        finally:
            self._is_over.set()

    def _watch(self) -> None:
        """Look now and then which addresses do not answer: when a rank is given up its connection is closed."""
        while self._counter is not None and not self._is_over.wait(WATCH_SECONDS):
            self._counter.unanswered()

    def _explain(self, error: RuntimeError) -> PeerLost | Preempted:
        was_asked = self._stop.asked  # before the look, in which a launcher may give this rank up
        was_suspended = not was_asked and self._stop.was_just_resumed()
        lost = self._who_is_lost(error)
        nobody_says_why = lost.cause_code == ExitCode.PREEMPTED
        if nobody_says_why and was_asked:
            return Preempted(f"{self._stop.name} came, and another rank is gone: {gist_of(error)}.")
        if nobody_says_why and was_suspended:
            return Preempted(
                f"Rank {self._ranks.rank} was suspended for longer than the ranks wait for one another"
                f" ({gist_of(error)}). The same command goes on from the last checkpoint."
            )
        return lost

    def _who_is_lost(self, error: RuntimeError) -> PeerLost:
        where = "".join(f" {note}" for note in getattr(error, "__notes__", []))
        begin = f"Rank {self._ranks.rank} lost its connection to another rank{where} and stops"
        unanswered = [] if self._counter is None else self._counter.unanswered()
        self._store.set_timeout(timedelta(seconds=ANSWER_SECONDS))
        words, gone, who = {}, [], []
        try:
            words, gone = self._look()
        except dist.DistError:
            who = [f"{self._name(0)}, which keeps the ranks' store, is gone or does not answer"]
        own = {rank: (int(word[0]), str(word[1])) for rank, word in words.items() if word is not None}
        if own:
            rank, (code, reason) = max(own.items(), key=lambda item: item[1][0])  # the code a launcher ends with
            lost = PeerLost(f"{begin}: {self._name(rank)} ended by itself with exit code {code}: {reason}")
            lost.cause_code = code
            return lost
        who += [f"{self._name(rank)} ended without a word (was it killed?)" for rank in gone]
        is_wordless = bool(who)
        who = who or [f"{self._name(rank)} has ended, too" for rank in words]
        who = who or [f"{self._at(address)} does not answer" for address in unanswered]
        if not who:  # this rank has sent nothing that could be acknowledged
            silent = [place for place in self._places if place.rank != self._ranks.rank]
            who = [f"nothing came from {tell(silent)}, which does not answer"] if len(silent) == 1 else []
            who = who or [f"nothing came from one of {tell(silent)}"] if silent else []
        who.append(cause_of(error, is_wordless=is_wordless))
        told = f"{begin} ({gist_of(error)}): {'; '.join(who)}. The same command goes on."
        lost = PeerLost(told)
        lost.cause_code = ExitCode.PREEMPTED
        return lost

    def _look(self) -> tuple[dict[int, Any], list[int]]:
        """(What each rank that has ended says, ranks that ended without a word): exit code and reason, or null."""
        deadline = time.monotonic() + LOOK_SECONDS
        while True:
            words, gone = {}, []
            for rank in self._others:
                if self._store.check([_word_key(rank)]):
                    words[rank] = json.loads(self._store.get(_word_key(rank)))
                elif self._store.check([gone_key(rank)]):
                    gone.append(rank)
            is_everyone = len(words) + len(gone) == len(self._others)
            if any(words.values()) or is_everyone or time.monotonic() > deadline:
                return words, gone
            time.sleep(PAUSE_SECONDS)

    def _leave(self, error: BaseException) -> None:
        """Say why this rank ends; rank 0 then lets the others go first."""
        is_own = not isinstance(error, PeerLost | Preempted)
        # A library that leaves with 0 in the middle of a training has not done it.
        code = code_of(error) or int(ExitCode.INTERNAL)
        word = [code, shortened(str(error) or type(error).__name__, LONGEST_REASON)] if is_own else None
        self._store.set_timeout(timedelta(seconds=ANSWER_SECONDS))
        with contextlib.suppress(dist.DistError):  # nobody is there to be told
            self._store.set(_word_key(self._ranks.rank), json.dumps(word))
            if is_own:
                self._store.set(FAILED_KEY, "")
            if self._ranks.is_first and not are_causes_collected() and not isinstance(error, Preempted):
                self._break_connections()
                deadline = time.monotonic() + LAST_WORDS_SECONDS
                while not self._store.check([gone_key(rank) for rank in self._others]) and time.monotonic() < deadline:
                    time.sleep(PAUSE_SECONDS)

    def _break_connections(self) -> None:
        """End those to other ranks but the store's, by which the others notice.

        On one machine every other connection over the loopback ends with them: nothing is to use one any more.
        """
        addresses = {place.address for place in self._places}
        for connection in own_connections():
            if connection.remote[0] in addresses and self._port not in (connection.local[1], connection.remote[1]):
                with contextlib.suppress(OSError):
                    handle = socket.socket(connection.family, socket.SOCK_STREAM, 0, fileno=connection.descriptor)
                    try:
                        handle.shutdown(socket.SHUT_RDWR)
                    finally:
                        handle.detach()  # the descriptor is gloo's to close

    @property
    def _others(self) -> list[int]:
        return [rank for rank in range(self._ranks.world_size) if rank != self._ranks.rank]

    def _name(self, rank: int) -> str:
        return str(self._places[rank]) if self._places else f"rank {rank}"

    def _at(self, address: str) -> str:
        ranks = [str(place.rank) for place in self._places if place.address == address]
        return f"{address} (rank {', '.join(ranks)})" if ranks else address


def _word_key(rank: int) -> str:
    return f"ended/{rank}"
