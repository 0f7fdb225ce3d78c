"""What ranks say when they end, and how those that lose them understand it: two and three ranks of one store."""

import socket
import threading
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch.distributed as dist

from pipeline.core import exits
from pipeline.core.errors import DataError, ExitCode, LedgerError, PeerLost, Preempted
from pipeline.core.exits import code_of
from pipeline.run.launch.preempt import StopRequest
from pipeline.run.launch.ranks import RankInfo
from pipeline.run.launch.secret import SECRET_VARIABLE, new_secret
from pipeline.training.endings import Endings
from pipeline.training.lost_peers import is_of_a_lost_peer
from pipeline.training.meeting import Meeting, gone_key
from pipeline.training.store import RankStore
from pipeline.training.store_server import StoreServer

SECRET = new_secret()
BROKEN = "[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4242"


@pytest.fixture(autouse=True)
def nobody_collects(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (exits.VARIABLE, exits.PIPE_VARIABLE):
        monkeypatch.delenv(name, raising=False)


class Rank:
    """One rank's view: a connection to the store, and its ending."""

    def __init__(self, place: tuple[str, int], rank: int, world_size: int) -> None:
        self.store = RankStore(place, SECRET, 30.0)
        self.store.leave_will(gone_key(rank))
        meeting: Any = type("Met", (), {"store": self.store, "places": [], "port": place[1]})()
        ranks = RankInfo(rank, world_size, rank, world_size, 0, 1, "127.0.0.1", 29500, "by hand")
        self.endings = Endings(ranks, cast(Meeting, meeting), None, StopRequest())

    def end(self, error: BaseException) -> BaseException:
        """End as the error says; what it ends with. A rank of its own process would be gone then."""
        try:
            with self.endings.told():
                raise error
        except BaseException as ending:
            return ending
        finally:
            self.store._socket.close()


@pytest.fixture
def ranks() -> Iterator[list[Rank]]:
    listener = socket.create_server(("127.0.0.1", 0))
    place = listener.getsockname()
    StoreServer(listener, SECRET)
    found = [Rank(place, rank, 3) for rank in range(3)]
    yield found
    for rank in found:
        rank.store._socket.close()


def test_the_gravest_code_is_everyones(ranks: list[Rank]) -> None:
    ranks[1].end(DataError("a shard is torn"))
    ranks[2].end(LedgerError("12 bytes too many"))
    lost = ranks[0].end(RuntimeError(BROKEN))
    assert isinstance(lost, PeerLost) and code_of(lost) == ExitCode.LEDGER
    assert str(lost).endswith("rank 2 ended by itself with exit code 6: 12 bytes too many")


def test_without_a_word_it_may_go_on(ranks: list[Rank]) -> None:
    """One was killed, the other was asked to stop, which is no cause."""
    ranks[1].store._socket.close()
    ranks[2].end(Preempted("SIGTERM came"))
    lost = ranks[0].end(RuntimeError(BROKEN))
    assert code_of(lost) == ExitCode.PREEMPTED
    assert "rank 1 ended without a word (was it killed?); its log may say more. The same command" in str(lost)


def test_all_others_were_asked_to_stop(ranks: list[Rank]) -> None:
    for rank in ranks[1:]:
        rank.end(Preempted("SIGTERM came"))
    lost = ranks[0].end(RuntimeError(BROKEN))
    assert code_of(lost) == ExitCode.PREEMPTED
    assert "rank 1 has ended, too; rank 2 has ended, too; the cause is in what" in str(lost)
    assert str(lost).endswith("The same command goes on.")


def test_who_leaves_with_0_in_the_middle_has_not_done_it(ranks: list[Rank]) -> None:
    ranks[1].end(SystemExit(0))
    ranks[2].store._socket.close()
    assert code_of(ranks[0].end(RuntimeError(BROKEN))) == ExitCode.INTERNAL


def test_who_waits_for_a_word_hears_that_none_will_come(ranks: list[Rank]) -> None:
    """Also of rank 0, which keeps the store, and lets the others hear of it before it ends."""
    heard: list[BaseException] = []

    def wait(rank: Rank) -> None:
        with pytest.raises(dist.DistError) as silence:
            rank.store.get("what rank 0 says")
        heard.append(rank.end(cast(RuntimeError, silence.value)))

    waiting = [threading.Thread(target=wait, args=(rank,)) for rank in ranks[1:]]
    for thread in waiting:
        thread.start()
    ranks[0].end(LedgerError("12 bytes too many"))
    for thread in waiting:
        thread.join(10)
        assert not thread.is_alive()
    assert [code_of(error) for error in heard] == [ExitCode.LEDGER] * 2
    assert all("rank 0 ended by itself with exit code 6: 12 bytes too many" in str(error) for error in heard)


def test_ranks_that_never_met_would_not_meet_the_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECRET_VARIABLE, SECRET)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
    ranks = RankInfo(0, 2, 0, 1, 0, 2, "127.0.0.1", port, "by hand")
    meeting = Meeting(ranks, 0.2)
    with pytest.raises(PeerLost, match="did not find the others") as lost:
        meeting.agree("a", lambda: 1)
    cast(RankStore, meeting.store)._socket.close()
    assert code_of(lost.value) == ExitCode.INTERNAL


def test_what_nccl_was_asked_wrongly_is_no_lost_peer() -> None:
    error = dist.DistBackendError("NCCL error in: init.cpp, invalid usage (run with NCCL_DEBUG=WARN for details)")
    assert not is_of_a_lost_peer(error)
    assert is_of_a_lost_peer(dist.DistBackendError("NCCL error: remote process exited or there was a network error"))
