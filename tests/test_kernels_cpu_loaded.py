"""How the C++ kernels come into a process: as torch operators, compiled graphs, without a compiler, over a fork."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import kernels
from tests.cpu_inputs import Draw, with_batches


def test_operators_pass_torchs_own_checks() -> None:
    checks = ("test_schema", "test_faketensor")
    for name, args in with_batches(torch.float32):
        torch.library.opcheck(getattr(torch.ops.dynact, name).default, args, test_utils=checks)
    q = torch.randn(1, 4, 1, 8)
    args = (q, torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8), torch.tensor(5))
    torch.library.opcheck(torch.ops.dynact.decode_attention.default, args, test_utils=checks)


def test_compiles_whole() -> None:
    draw = Draw(0, torch.float32)
    w_gate, w_up, wt_down, t = draw(32, 16), draw(32, 16), draw(32, 16), torch.tensor(0.3)

    def step(x: Tensor) -> Tensor:
        h = kernels.dense_gemv_rows(x, w_gate) + 1
        return x + kernels.column_gemv_glu(h, kernels.dense_gemv_rows(x, w_up), wt_down, t, "silu")

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        x = Draw(seed, torch.float32)(1, 1, 16)
        torch.testing.assert_close(compiled(x), step(x))


RUN_WITHOUT_COMPILER = """
import warnings
import torch, kernels
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    x, wt, t = torch.randn(1, 1, 50), torch.randn(50, 20), torch.tensor(0.5)
    for _ in range(2):
        y = kernels.column_gemv(x, wt, t)
    from kernels import reference
    torch.testing.assert_close(y, reference.column_gemv(x, wt, t))
    kernels.neuron_mlp(x, torch.randn(9, 50), torch.randn(9, 50), wt[:9], torch.tensor([1, 2]), "silu")
    assert not kernels.cpu_extension() and not kernels.fast_path(x, wt)
ours = [w for w in caught if "C++ kernels" in str(w.message)]
assert len(ours) == 1, [str(w.message) for w in caught]
"""


RUN_COMPILED_FIRST = """
import torch, kernels
x, wt, t = torch.randn(1, 50), torch.randn(50, 20), torch.tensor(0.5)
y = torch.compile(lambda x: torch.ops.dynact.column_gemv(x, wt, t), fullgraph=True, backend="aot_eager")(x)
assert torch.ops.dynact_cpu.isa("") in ("avx512vnni", "avx512", "avx2", "generic")
from kernels import reference
torch.testing.assert_close(y, reference.column_gemv(x, wt, t))
"""


def run_python(code: str, **env: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr


def test_without_a_compiler_torch_does_it_with_one_warning(tmp_path) -> None:
    run_python(RUN_WITHOUT_COMPILER, CXX="/nonexistent/c++", DYNACT_CACHE=str(tmp_path))


def test_a_compiled_graph_finds_the_extension() -> None:
    run_python(RUN_COMPILED_FIRST)


RUN_FORKED = """
import os
from concurrent.futures import ThreadPoolExecutor
import torch, kernels
torch.set_num_threads(2)
x, w = torch.randn(1, 1200), torch.randn(1200, 2000)
y = kernels.dense_gemv(x, w)
with ThreadPoolExecutor(4) as callers:
    assert all(torch.equal(y, z) for z in callers.map(lambda _: kernels.dense_gemv(x, w), range(40)))
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(y, kernels.dense_gemv(x, w)) else 1)
assert os.waitpid(child, 0)[1] == 0
"""


def test_threads_survive_several_callers_and_a_fork() -> None:
    run_python(RUN_FORKED)


@pytest.mark.slow
def test_a_build_that_was_cut_off_is_done_again(tmp_path) -> None:
    code = "import kernels, warnings; warnings.simplefilter('error'); assert kernels.cpu_extension()"
    run_python(code, DYNACT_CACHE=str(tmp_path))
    (complete,) = tmp_path.glob("kernels/*/complete")
    complete.unlink()
    (complete.parent / "dynact_cpu.so").write_bytes(b"half")
    run_python(code, DYNACT_CACHE=str(tmp_path))
    assert complete.exists()
