"""Gluon kernels for Hopper on a CPU: the same source, the same answers, and their faults found.

    launch(kernel, grid, args, seed=0)    runs one kernel on CPU tensors
    with emulated(seed=0) as stats:       core.launch's Launcher runs Gluon kernels this way

A kernel's module is loaded a second time against an emulated `swathe.kernels.core.gluon`, which is
why kernels take every Gluon name from there. Partitions are threads that pass one baton in an order
drawn from the seed, so a seed repeats a run exactly; programs of a grid run in a random order, up
to three side by side. Copies land at random times and leave NaN until they do.

What a run that passes shows, in its order of events
    the numbers, to the rounding of every operation; fp32 sums may differ in the last bits
    no deadlock, no loop without an end, no more or fewer arrivals and bytes than a phase has
    every address of a load or store is in a tensor argument, int32 does not overflow
    no memory is read that nobody wrote, or as another dtype or width than it was written
    shapes, boxes, alignments and sizes that the hardware takes

What it shows whatever the order, as clocks and not luck decide it (races.py)
    accesses to shared and global memory, by partitions, copies and products, of which one writes,
    are ordered by mbarriers, named barriers, waits, atomics or the start and end of partitions
    what partitions write is fenced by its writer before a copy or a product sees it
    products and stores are waited for before their operands change, registers too

What it cannot show
    races between the threads of one partition: partition_barrier is only a place to switch
    layouts: they must agree between operands and are not otherwise checked; compiling does that
    an element's place in a swizzle; bank conflicts; anything about time
    that the names of named barriers are free, past those that Triton is known to take
    weak memory: an atomic orders everything, an mbarrier is seen by copies once it is initialised
    global memory that a kernel writes and then copies in, which takes a fence of another kind
    that setmaxnreg gets its registers; that what Triton adds still fits into shared memory
    one tensor argument as two dtypes: each has a record of its own of who touched it

A message names the kernel's line, the partition and the program; a deadlock, all who wait and for
what. tests/support/test_gluon_*.py are the proof of all this.

    language.py, tensors.py        gl: functions and values in registers
    memory.py, global_memory.py    shared memory and views of it; pointers
    barriers.py, copies.py         mbarriers and named barriers; the tensor memory accelerator
    matrix.py, partitions.py       wgmma; warp_specialize
    races.py, schedule.py          what is ordered; who runs next
    twins.py, launch.py            kernels loaded anew; a launch, and what it counts
"""

from support.gluon.launch import Stats, emulated, launch
from support.gluon.schedule import EmulationError

__all__ = ["EmulationError", "Stats", "emulated", "launch"]
