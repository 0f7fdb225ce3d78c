"""One rank of a group that does nothing but all-reduce four bytes; rank 0 prints the seconds of a round.

Started by `benchmarks.forecast` in the lab: what a message costs where neither bytes nor computation count.
"""

import os
import statistics
import time

import torch
import torch.distributed as dist

NUM_CALLS = 500


def main() -> None:
    """The median of many, over the 2(n-1) rounds of gloo's ring."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    number = torch.zeros(1)
    seconds = []
    for call in range(NUM_CALLS + 50):
        started = time.perf_counter()
        dist.all_reduce(number)
        if call >= 50:  # connections are made and warm
            seconds.append(time.perf_counter() - started)
    if dist.get_rank() == 0:
        print(f"round_seconds {statistics.median(seconds) / (2 * (dist.get_world_size() - 1)):.9f}", flush=True)
    dist.barrier()
    os._exit(0)  # gloo's threads may abort the interpreter's ordinary end (torch 2.14, 2026-11)


if __name__ == "__main__":
    main()
