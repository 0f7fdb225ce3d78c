"""Hooks in torch that find out what a program does without asking it: groups, modules, optimiser steps, the end.

Where torch offers a hook it is used (process groups, optimisers). Where it does not, the one function is wrapped that
every way leads through, looked up when it is called: so it does not matter in which order a program imports and makes
things, nor under which name it holds torch's functions.
"""

import atexit
import functools
import inspect
import multiprocessing.util
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore
from torch.distributed import distributed_c10d as c10d
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from pipeline.comm.collectives import PHASES
from pipeline.core.errors import ConfigError
from pipeline.metering.owed import Owed
from pipeline.metering.posts import RefusedError
from pipeline.metering.record import say
from pipeline.metering.session import Session
from pipeline.metering.settings import Settings

EXIT_PRIORITY = 100  # of multiprocessing's finalizers, which its children run in place of atexit's


class Patches:
    """The meter in this process: in place from `install` to `remove`.

    Args:
        settings: What is metered, and where it is written.
        is_strict: Whether a run that cannot be written is the program's error, too.
    """

    def __init__(self, settings: Settings, *, is_strict: bool = False) -> None:
        self.settings, self._is_strict = settings, is_strict
        self.session: Session | None = None
        """Of the default group that exists; None before the first."""
        self._owed = Owed()
        self._store_ports: set[int] = set()
        self._pid = os.getpid()
        self._undo: list[Callable[[], object]] = []

    def install(self) -> None:
        """Put the hooks in place; groups and modules that exist already are metered from here on."""
        self._replace(c10d, "_new_process_group_helper", self._making_group)
        self._replace(dist.ProcessGroup, "shutdown", self._ending_group)
        self._replace(dist.ProcessGroup, "monitored_barrier", self._passing_hook)
        self._replace(TCPStore, "__init__", self._making_store)
        self._replace(DistributedDataParallel, "__init__", self._wrapping_module)
        self._replace(torch.autograd, "backward", self._going_backward)
        for handle in (
            register_optimizer_step_pre_hook(self._step_begins),
            register_optimizer_step_post_hook(self._step_ends),
        ):
            self._undo.append(handle.remove)
        # A process of multiprocessing ends without atexit, any other one without multiprocessing's finalizers being
        # sure to run in time: both, and the second finds that all is done.
        finalizer = multiprocessing.util.Finalize(None, self.finish, exitpriority=EXIT_PRIORITY)
        self._undo.append(finalizer.cancel)
        atexit.register(self.finish)
        self._undo.append(lambda: atexit.unregister(self.finish))
        self._owed.find()
        self._adopt_existing()

    def remove(self) -> None:
        """Finish, and leave torch as it was."""
        self.finish()
        while self._undo:
            self._undo.pop()()

    def finish(self) -> None:
        """The program ends, or the part of it that is metered. A forked process has nothing of its own to finish."""
        if self.session is not None and os.getpid() == self._pid:
            with self.session.guarded():
                self.session.leave()
            with self.session.guarded():
                self.session.conclude()

    def set_phase(self, phase: str) -> str | None:
        """Enter a phase that the program names; returns the one left, None where nothing is metered.

        Raises:
            ValueError: There is no such phase.
        """
        if phase not in PHASES:
            raise ValueError(f"phase {phase!r} is none of {', '.join(PHASES)}.")
        return self._tell(lambda session: session.set_phase(phase, is_told=True))

    def _tell(self, what: Callable[[Session], Any]) -> Any:
        """Tell the session something, while there is one; what it answers."""
        session = self.session
        if session is not None and session.is_on and os.getpid() == self._pid:
            with session.guarded():
                return what(session)
        return None

    @property
    def is_writer(self) -> bool:
        """Whether this process is rank 0 of what was metered."""
        return self.session is not None and self.session.is_writer

    def _replace(self, owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Wrap a function where everybody looks it up; what is put back is what lay there, as a class holds it.

        Where somebody else has wrapped it since, it stays as it is: ours does nothing once the meter is removed.
        """
        original, lay_there = getattr(owner, name), vars(owner).get(name)
        ours = functools.wraps(original)(make(original))

        def put_back() -> None:
            if vars(owner).get(name) is not ours:
                return
            if lay_there is None:
                delattr(owner, name)
            else:
                setattr(owner, name, lay_there)

        setattr(owner, name, ours)
        self._undo.append(put_back)

    # --- groups ---

    def _making_group(self, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        def make(*arguments: Any, **more: Any) -> Any:
            made = original(*arguments, **more)
            told = signature.bind(*arguments, **more).arguments
            try:
                ranks = told["global_ranks_in_group"]
                self._made(made[0], told["group_size"], told["group_rank"], ranks, told["store"])
            except KeyError as error:
                say(f"a process group is not metered: this torch has no {error} where torch 2.14 has.")
            return made

        return make

    def _made(self, group: Any, size: int, rank: int, ranks: list[int], store: Any) -> None:
        if os.getpid() != self._pid or group is None:
            return
        is_member = group is not dist.GroupMember.NON_GROUP_MEMBER
        config = c10d._world.pg_backend_config.get(group, "") if is_member else ""
        if not ranks:
            self._begin(group, rank, size, config, store)
        else:
            name = c10d._world.pg_names[group] if is_member else f"of ranks {','.join(map(str, ranks))}"
            self._tell(lambda session: session.add_group(name, group if is_member else None, ranks, config))

    def _begin(self, group: Any, rank: int, size: int, config: str, store: Any) -> None:
        self.finish()  # the last group's ranks have all come here
        session = Session(self.settings, self._owed, self._store_ports)
        try:
            session.begin(group, rank, size, config, store)
        except RefusedError:
            return
        except ConfigError as error:
            if self._is_strict:
                raise
            say(f"this program is not metered: {error}")
            return
        except Exception as error:
            say(f"this program is not metered ({type(error).__name__}: {error}).")
            return
        self.session = session

    def _adopt_existing(self) -> None:
        """Meter the groups that were made before."""
        if not dist.is_initialized():
            return
        world = dist.group.WORLD
        assert world is not None
        config = c10d._world.pg_backend_config[world]
        self._begin(world, dist.get_rank(), dist.get_world_size(), config, c10d._get_default_store())
        for group, name in list(c10d._world.pg_names.items()):
            if group is not world:
                ranks = sorted(c10d._world.pg_group_ranks[group], key=c10d._world.pg_group_ranks[group].__getitem__)
                config = c10d._world.pg_backend_config[group]
                self._tell(
                    functools.partial(Session.add_group, name=name, group=group, ranks=ranks, backend_config=config)
                )

    def _ending_group(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def shutdown(group: Any, /, *arguments: Any, **more: Any) -> Any:
            if self.session is not None and os.getpid() == self._pid:
                with self.session.guarded():
                    self.session.group_ends(group)
            return original(group, *arguments, **more)

        return shutdown

    def _passing_hook(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def counted(group: Any, /, *arguments: Any, **more: Any) -> Any:
            self._tell(lambda session: session.passes_by(group, "monitored_barrier"))
            return original(group, *arguments, **more)

        return counted

    def _making_store(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def init(store: Any, /, *arguments: Any, **more: Any) -> None:
            original(store, *arguments, **more)
            self._store_ports.add(store.port)
            self._tell(lambda session: session.ignore_store(store.port))

        return init

    # --- modules and optimisers ---

    def _wrapping_module(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def init(wrapped: DistributedDataParallel, /, *arguments: Any, **more: Any) -> None:
            original(wrapped, *arguments, **more)
            self._owed.found(wrapped)

        return init

    def _going_backward(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def backward(*arguments: Any, **more: Any) -> Any:
            self._tell(Session.begin_training)
            return original(*arguments, **more)

        return backward

    def _step_begins(self, optimizer: Any, *_: Any) -> None:
        frame = sys._getframe(1)
        self._tell(lambda session: session.begin_step(optimizer, frame))

    def _step_ends(self, optimizer: Any, *_: Any) -> None:
        self._tell(lambda session: session.end_step(optimizer))
