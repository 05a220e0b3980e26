"""A Slurm cluster of two nodes on this machine, for tests: Debian's slurmctld, slurmd and munge on loopback.

`python -m tests.slurm_cluster FOLDER COMMAND …` runs a command on one. Needs root, for slurmd.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

DAEMONS = ("slurmctld", "slurmd", "munged")
COMMANDS = ("sbatch", "srun", "scontrol", "scancel", "squeue", "sinfo")
SBIN = "/usr/sbin"
READY_S = 60.0

# Two partitions over the same nodes: what is submitted to `urgent` puts jobs of `normal` back in the queue.
CONFIG = """\
ClusterName=tiny
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=6
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
KillWait=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs={cpus} RealMemory=4000
PartitionName=normal Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=n[1-2] MaxTime=INFINITE State=UP PriorityTier=9
"""

# There is no accounting: what submitit asks sacct for, the controller knows for five minutes after a job has ended.
SACCT = """\
#!{python}
import re, subprocess, sys
print("JobID|State|NodeList")
for job in {{value for flag, value in zip(sys.argv, sys.argv[1:]) if flag == "-j"}}:
    shown = subprocess.run(["scontrol", "show", "job", "-o", job], capture_output=True, text=True).stdout
    for line in shown.splitlines():
        facts = dict(part.split("=", 1) for part in line.split() if "=" in part)
        if "JobId" in facts:
            task = facts.get("ArrayTaskId")
            task = f"[{{task}}]" if task and not task.isdigit() else task
            name = facts["JobId"] if task is None else facts["ArrayJobId"] + "_" + task
            print(name, facts["JobState"], facts.get("NodeList", ""), sep="|")
"""


def missing() -> str | None:
    """Why no cluster can be started here, in one sentence; None if one can."""
    if os.geteuid() != 0:
        return "a Slurm cluster for tests is started as root only"
    gone = [n for n in (*DAEMONS, *COMMANDS) if shutil.which(n, path=f"{os.environ['PATH']}:{SBIN}") is None]
    if gone:
        return f"no {', '.join(gone)} here (Debian: apt-get install slurmctld slurmd munge slurm-client)"
    return None


@contextlib.contextmanager
def cluster(folder: Path, cpus: int = 2) -> Iterator[dict[str, str]]:
    """Two nodes of so many CPUs each; yields the environment in which Slurm's commands reach them."""
    short = Path(tempfile.mkdtemp(prefix="slurm"))  # a socket's path may have a hundred letters
    short.chmod(0o711)
    (short / "state").mkdir()
    (short / "bin").mkdir()
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in range(2)]
        ports = _ports(held)
    config = short / "slurm.conf"
    config.write_text(CONFIG.format(host=socket.gethostname(), folder=short, ports=ports, cpus=cpus))
    sacct = short / "bin/sacct"
    sacct.write_text(SACCT.format(python=sys.executable))
    sacct.chmod(0o755)
    path = f"{short / 'bin'}:{os.environ['PATH']}:{SBIN}"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    environment |= {"SLURM_CONF": str(config), "PATH": path}
    key = short / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    munge = [
        f"--{name}={short}/munge.{name.partition('-')[0]}" for name in ("socket", "pid-file", "log-file", "seed-file")
    ]
    running: list[subprocess.Popen[bytes]] = []
    log = open(short / "daemons.log", "w")
    try:
        for command in (
            ["munged", "--foreground", "--force", f"--key-file={key}", *munge],
            ["slurmctld", "-D", "-c"],
            ["slurmd", "-D", "-N", "n1"],
            ["slurmd", "-D", "-N", "n2"],
        ):
            program = shutil.which(command[0], path=path)
            running.append(subprocess.Popen([str(program), *command[1:]], env=environment, stdout=log, stderr=log))
            if command[0] == "munged":
                _until(lambda: (short / "munge.socket").exists(), short)
        _until(lambda: _idle(environment), short)
        yield environment
    finally:
        subprocess.run(["scancel", "--user=root"], env=environment, check=False, capture_output=True)
        with contextlib.suppress(RuntimeError):  # else their processes would outlive the cluster
            _until(lambda: _reply(environment, "squeue", "-h") == "", short, within_s=30.0)
        for process in reversed(running):
            process.terminate()
        for process in running:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
        log.close()
        folder.mkdir(parents=True, exist_ok=True)
        for kept in short.glob("*.log"):
            shutil.copy(kept, folder)
        shutil.rmtree(short, ignore_errors=True)


def _ports(held: list[socket.socket]) -> tuple[int, int, int]:
    """Free ones: the controller's, and two in a row for the nodes."""
    held[0].bind(("127.0.0.1", 0))
    while True:
        held[1].bind(("127.0.0.1", 0))
        first = held[1].getsockname()[1]
        with socket.socket() as second, contextlib.suppress(OSError, OverflowError):
            second.bind(("127.0.0.1", first + 1))
            return held[0].getsockname()[1], first, first + 1
        held[1].close()
        held[1] = socket.socket()


def _idle(environment: Mapping[str, str]) -> bool:
    shown = _reply(environment, "sinfo", "-h", "-N", "-o", "%N %t")
    return sum(line.endswith(" idle") for line in shown.splitlines()) >= 2


def _reply(environment: Mapping[str, str], *command: str) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True).stdout


def _until(ready: Callable[[], bool], folder: Path, within_s: float = READY_S) -> None:
    deadline = time.monotonic() + within_s
    while not ready():
        if time.monotonic() > deadline:
            logs = "\n".join(path.read_text()[-2000:] for path in folder.glob("*.log"))
            raise RuntimeError(f"the Slurm cluster did not get there in {within_s:.0f} s:\n{logs}")
        time.sleep(0.1)


if __name__ == "__main__":
    with cluster(Path(sys.argv[1])) as environment:
        sys.exit(subprocess.run(sys.argv[2:], env=environment).returncode)
