"""How gloo and NCCL report a peer that is gone or silent, and what that says to people."""

import re

import torch.distributed as dist

# How gloo reports a peer that stayed silent, to the transfer that waited longest, and to the others whose connection it
# closes then; several buckets wait at once, and which of them is heard of first is chance.
OF_A_SILENT_PEER = ("Timed out waiting", "Application timeout caused pair closure")
# The same and how it reports a connection that broke.
OF_A_LOST_PEER = ("gloo/transport", *OF_A_SILENT_PEER)
# What NCCL was asked wrongly, by this rank.
OF_MISUSE = ("invalid usage", "invalid argument")


def is_of_a_lost_peer(error: RuntimeError) -> bool:
    """Tell whether `error` is the broken or silent connection to a peer, as gloo and NCCL report it."""
    text = str(error)
    if isinstance(error, dist.DistError):
        return not any(words in text for words in OF_MISUSE)
    return any(words in text for words in OF_A_LOST_PEER)


def _is_of_a_silent_peer(error: RuntimeError) -> bool:
    return any(words in str(error) for words in OF_A_SILENT_PEER)


def gist_of(error: RuntimeError) -> str:
    """Return the one clause of gloo's report that says something: `Connection closed by peer`."""
    if _is_of_a_silent_peer(error):
        return "silent for longer than cluster.step_timeout_seconds, outside steps cluster.timeout_seconds"
    words = str(error).partition("\n")[0]
    found = re.search(r"gloo/transport/\S+\] (.*?)(?: \[|\. |$)", words)
    return found[1] if found else words[:200]


def cause_of(error: RuntimeError, *, is_wordless: bool) -> str:
    """Return where the cause is to be looked for; `is_wordless`: who is lost is known, and left no word."""
    cause = "its log may say more" if is_wordless else "the cause is in what that rank said, here or in its own log"
    if _is_of_a_silent_peer(error):
        cause += "; or the network is gone, or carries no large packets (is the MTU the same on all of the way?)"
    return cause
