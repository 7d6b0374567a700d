"""Threads: how they share the items of a region, and how they wait for each other at its end."""

from refmamba.backends.cpu.kernels.tables import LINE, Run, at, inlined, kernel
from refmamba.backends.cpu.kernels.vectors import fetch, fetch_add, give_way, pause


@inlined
def share(run, counter, items):
    """The next share of a region's items, first to last - 1; from `items` on there is none.

    Every thread's first share is a part of one half of the items, its next of one half of the rest, and so on: few calls,
    each a line that travels between cores, neighbours that the machine's prefetchers know, and small shares at the end.
    """
    threads, n = at(run, Run.THREADS), fetch_add(counter, 1)
    left = items >> (n // threads)
    half = left - (left >> 1)
    first = items - left
    return first + n % threads * half // threads, first + (n % threads + 1) * half // threads


@kernel()
def meet(counter, items, mine):
    """Wait until a region's items are done, `mine` of them by this thread. Returns the next region's counter.

    A thread is not waited for, only its items: one that the system has put aside holds nobody up, and passes the regions
    that went on without it. Waiting spins, as a region is shorter than a sleep, and gives way when it is long.
    """
    done = counter + 8
    fetch_add(done, mine)
    spins = 0
    while fetch(done) < items:
        spins += 1
        if spins < 2000:
            pause(0)
        else:
            give_way(0)
    return counter + LINE
