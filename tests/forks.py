"""Commands as processes of their own that begin where all is imported.

A fresh process imports torch and transformers for six seconds of CPU before it does anything; a suite starts a hundred.
`Forks` keeps one process that has imported what a run does, but no model's code, and forks it for each command: its own
working folder, environment, pipes, signals and exit, as `subprocess.Popen` gives them. What differs from a fresh
process: what Python and its libraries read of the environment as they start was read before (PYTHON*, HF_HUB_OFFLINE).
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
MODEL_CODE = "transformers.models.llama.modeling_llama"  # that tests see a run import, or not
NEEDED = (
    *("harness.run.app", "harness.run.execute", "harness.run.worker", "harness.run.workers", "harness.run.loading"),
    *("harness.report.terminal", "harness.report.tracking", "harness.results.collect", "harness.model.lm"),
    *("harness.data.tasks", "scipy.stats", "lm_eval.evaluator", "datasets", "submitit"),
    *("transformers.modeling_utils", "transformers.masking_utils", "transformers.models.llama.configuration_llama"),
)
MESSAGE = 1 << 20


class Process:
    """A command that runs: what `subprocess.Popen` is, with stdout and stderr in pipes as text."""

    def __init__(self, args: Sequence[str], answers: int, out: int, err: int) -> None:
        self.args, self.returncode = list(args), None
        self._answers, self._told = answers, b""
        self._texts: list[str] = ["", ""]
        self._readers = [threading.Thread(target=self._read, args=each, daemon=True) for each in enumerate((out, err))]
        for reader in self._readers:
            reader.start()
        while b"\n" not in self._told:
            self._hear(None)
        self.pid = int(self._told.split(b"\n")[0])

    def _read(self, place: int, pipe: int) -> None:
        with open(pipe, encoding="utf-8", errors="surrogateescape") as stream:
            self._texts[place] = stream.read()

    def _hear(self, within_s: float | None) -> bool:
        """Read what the keeper says of it; False where it has said nothing so long."""
        if not select.select([self._answers], [], [], within_s)[0]:
            return False
        said = os.read(self._answers, 100)
        assert said, "the process that keeps this one is gone"
        self._told += said
        return True

    def poll(self) -> int | None:
        if self.returncode is None and (self._told.count(b"\n") == 2 or self._hear(0)):
            self.returncode = int(self._told.split(b"\n")[1])
            os.close(self._answers)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.poll() is None and not self._hear(timeout):
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        code = self.poll()
        assert code is not None
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait until it and all that hold its pipes have ended; returns (stdout, stderr)."""
        end = None if timeout is None else time.monotonic() + timeout
        self.wait(timeout)
        for reader in self._readers:
            reader.join(None if end is None else max(0.0, end - time.monotonic()))
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return self._texts[0], self._texts[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Forks:
    """The process that is forked. Close it at the end."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.forks", str(theirs.fileno())],
            cwd=ROOT,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # no terminal: what is forked writes into pipes
        )
        theirs.close()
        assert self._socket.recv(MESSAGE) == b"ready", "it could not import what a run needs"

    def start(
        self, args: Sequence[str], cwd: Path, env: Mapping[str, str], before: str | None = None, workers: bool = True
    ) -> Process:
        """Run `python args...` in its folder and environment. args: a script or -m module, and its arguments.

        before: Python that runs in the process first; at the end it then says whether a model's code was imported.
        workers: whether the processes that it starts for workers=N are forked too.
        """
        (answers, its_answers), (out, its_out), (err, its_err) = (os.pipe() for _ in range(3))
        order = {"args": list(args), "cwd": str(cwd), "env": dict(env), "before": before, "workers": workers}
        socket.send_fds(self._socket, [json.dumps(order).encode()], [its_answers, its_out, its_err])
        for mine in (its_answers, its_out, its_err):
            os.close(mine)
        return Process([sys.executable, *args], answers, out, err)

    def close(self) -> None:
        self._socket.close()
        self._process.wait(60)


# ---------------------------------------------------------------------------------------- in the process that is forked


def prepare() -> None:
    """Import what runs do. Nothing may be computed: threads do not survive a fork."""
    import harness.run.engines
    import methods
    from harness.run import probing

    rooms = [methods, harness.run.engines]
    found = [f"{room.__name__}.{file.name}" for room in rooms for file in pkgutil.iter_modules(room.__path__)]
    for name in [*NEEDED, *found]:
        try:
            importlib.import_module(name)
        except ImportError:  # an engine of an extra that is not installed here
            assert name.startswith(("harness.run.engines", "submitit")), name
    for name in probing.names():
        probing.module(name)
    assert MODEL_CODE not in sys.modules
    assert threading.active_count() == 1


def serve(sock: socket.socket) -> dict[str, Any]:
    """Fork for every order that comes; returns the order in the process that is to carry it out."""
    while True:
        message, pipes, _, _ = socket.recv_fds(sock, MESSAGE, 3)
        if not message:
            os._exit(0)
        if os.fork() == 0:
            sock.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            pid = os.fork()
            if pid == 0:
                os.close(pipes[0])
                for stream, pipe in zip((1, 2), pipes[1:]):
                    os.dup2(pipe, stream)
                    os.close(pipe)
                return json.loads(message)
            keep(pid, *pipes)
        for pipe in pipes:
            os.close(pipe)


def keep(pid: int, answers: int, out: int, err: int) -> NoReturn:
    """Be the parent: say its number, then its exit code as `Popen` does."""
    os.close(out)
    os.close(err)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)  # of whoever started the tests: it may wait for the end of that
    os.write(answers, f"{pid}\n".encode())
    _, status = os.waitpid(pid, 0)
    os.write(answers, f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def become(order: Mapping[str, Any]) -> NoReturn:
    """Be the command from here on, to the end of this process."""
    import torch

    from harness.run import child
    from tests.chaos import Forked

    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", encoding="utf-8")  # as Python makes them for pipes
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", 1, encoding="utf-8", errors="backslashreplace")
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    if order["workers"]:
        child.subprocess = SimpleNamespace(**vars(subprocess) | {"Popen": Forked})
    script = order["args"][0] != "-m"
    sys.argv = order["args"] if script else order["args"][1:]
    names: dict[str, Any] = {"sys": sys}
    code: Any = 0
    try:
        exec(order["before"] or "", names)
        if script:
            runpy.run_path(sys.argv[0], run_name="__main__")
        else:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if order["before"] is not None:
        print("model code imported:", MODEL_CODE in sys.modules, file=sys.stderr)
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code or 0)  # as Python ends, but for taking half a gigabyte of modules apart, which takes a second


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as orders:
        prepare()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the tests
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        orders.send(b"ready")
        become(serve(orders))
