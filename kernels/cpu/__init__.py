"""The CPU kernels in C++ (csrc/), for AVX-512 (with VNNI or without), AVX2 and plain loops, picked at run time.

Built on first use (about a minute on two cores; a C++ compiler and ninja) into $DYNACT_CACHE/kernels or
~/.cache/dynact/kernels. Without a compiler everything runs through kernels.cpu.fallback, after one warning.

Threads: a kernel uses as many threads as torch.get_num_threads() says, and one where a part would be under 1 MiB. The
parts are fixed by sizes, so results repeat bit for bit at a given number of threads. The threads are a pool of our own
(csrc/pool.h) that sleeps when idle. torch's own operators use OpenMP, whose idle threads spin: on a machine that is
shared, set OMP_WAIT_POLICY=PASSIVE before torch is imported. Even then a library call in every layer (attention) can
cost more on two busy cores than all projections, so decode runs attention here too. One core nearly saturates the
memory of a small machine, so one thread is the safe setting.

Memory: rows that are skipped at random cost page walks. Transparent huge pages for the weights (THP_MEM_ALLOC_ENABLE=1
before torch is imported, where the system allows it) make the kernels about a tenth faster on large models.
"""

import torch
from torch import Tensor

from kernels.cpu.build import load_extension


def instruction_set(name: str = "") -> str:
    """The instruction set in use: "avx512vnni", "avx512", "avx2" or "generic". A name switches to it, for tests.

    Raises ValueError where this CPU cannot run it, RuntimeError where the extension is missing.
    """
    _need_extension()
    return torch.ops.dynact_cpu.isa(name)


def stream(buffer: Tensor) -> None:
    """Read a contiguous CPU tensor once from end to end, with torch's threads: the yardstick of bandwidth.

    Raises RuntimeError where the extension is missing.
    """
    _need_extension()
    torch.ops.dynact_cpu.stream(buffer)


def _need_extension() -> None:
    if not load_extension():
        raise RuntimeError("the C++ kernels are not available on this machine")
