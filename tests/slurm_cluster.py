"""A SLURM cluster of three nodes on this machine, for a session of tests: munged, slurmctld and a slurmd for each node.

Debian's packages slurm-wlm and munge are enough; every daemon has its own ports and writes to a temporary folder. The
nodes share the machine, so all of them have the address 127.0.0.1, and tests use one for servers at most.
"""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

NODES = ("n1", "n2", "n3")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
ROOT = Path(__file__).parents[1]
SETTINGS = """\
ClusterName=tiny
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1
SlurmdParameters=config_overrides
SwitchType=switch/none
MpiDefault=none
FirstJobId={first}
ReturnToService=2
SlurmdTimeout=6
KillWait=2
MessageTimeout=5
{nodes}
PartitionName=all Nodes=ALL Default=YES State=UP MaxTime=INFINITE
"""


@dataclass
class SlurmCluster:
    """The running cluster. `environment` is that of a user of it."""

    folder: Path
    environment: dict[str, str]
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def run(self, *command: object) -> str:
        """What a command of SLURM prints."""
        words = [str(word) for word in command]
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        pairs = (word.partition("=") for word in self.run("scontrol", "-o", "show", "job", number).split())
        return {name: value for name, _, value in pairs}

    def wait(self, number: str, state: str, log: Path, seconds: float = 400.0) -> dict[str, str]:
        """The job when it is in this state; fails when it ends in another."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        found: dict[str, str] = {}

        def there() -> bool:
            nonlocal found
            found = self.job(number)
            assert found["JobState"] == state or found["JobState"] not in ended, (found, text(log))
            return found["JobState"] == state

        until(there, lambda: f"{state} expected: {found}\n{text(log)}", seconds)
        return found

    def start_node(self, name: str) -> None:
        """Start the slurmd of a node, which is new or had been killed, and wait until jobs can run on it."""
        (self.folder / f"spool-{name}").mkdir(exist_ok=True)
        self._start(name, "slurmd", "-D", "-N", name)
        until(lambda: self.run("sinfo", "-h", "-n", name, "-o", "%T") in ("idle\n", "mixed\n"), self._said)

    def kill_node(self, name: str) -> None:
        """Kill a node's slurmd and everything that it runs, all at once."""
        mine = [each for each in psutil.process_iter() if _runs_on(each, name)]
        daemon = self.daemons.pop(name)
        for each in [psutil.Process(daemon.pid), *mine]:
            _kill(each)
        daemon.wait()

    def start(self) -> None:
        """Start everything. Each daemon is up when it answers."""
        munge = self.folder / "munge"
        files = [f"--{name}-file={munge / name}" for name in ("key", "pid", "log", "seed")]
        as_munge = ["runuser", "-u", "munge", "--", "munged"] if shutil.which("runuser") else ["munged"]
        socket_path = munge / "socket"
        self._start("munged", *as_munge, "--foreground", f"--socket={socket_path}", *files)
        until(socket_path.exists, self._said)
        self._start("slurmctld", "slurmctld", "-D")
        until(self._answers, self._said)
        for name in NODES:
            self.start_node(name)

    def stop(self) -> None:
        """End the jobs, then the daemons, then what they have left."""
        if "slurmctld" in self.daemons:
            subprocess.run(["scancel", "--user=root"], env=self.environment)
            until(lambda: not self.run("squeue", "-h"), self._said)
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for each in psutil.process_iter():
            if any(_runs_on(each, name) for name in NODES):
                _kill(each)
        shutil.rmtree(self.folder)

    def _start(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                command,
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _answers(self) -> bool:
        done = subprocess.run(["scontrol", "ping"], env=self.environment, capture_output=True, text=True)
        return "is UP" in done.stdout

    def _said(self) -> str:
        return "\n".join(f"{path.name}: {text(path)[-2000:]}" for path in self.folder.glob("*.log"))


def until(condition: Callable[[], bool], what: Callable[[], str], seconds: float = 180.0) -> None:
    """Waits until `condition` holds; fails with `what` says when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.2)


def text(path: Path) -> str:
    """What is in a file, if it is there."""
    return path.read_text() if path.exists() else ""


def _runs_on(process: psutil.Process, node: str) -> bool:
    """Whether it belongs to a job on that node of this cluster, or is the slurmstepd of one."""
    try:
        names = process.environ()
    except (psutil.Error, OSError):
        return False
    return names.get("SLURMD_NODENAME") == node and names.get("SLURM_CONF", "").startswith(_FOLDER)


_FOLDER = os.path.join(tempfile.gettempdir(), f"megatron-opd-slurm-{os.getpid()}-")


def _kill(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(signal.SIGKILL)


def _free_ports(count: int) -> list[int]:
    held = [socket.create_server(("", 0)) for _ in range(count)]
    ports = [int(each.getsockname()[1]) for each in held]
    for each in held:
        each.close()
    return ports


def _why_not() -> str:
    """What keeps a cluster from running here; empty: nothing."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"])
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        return f"no SLURM ({missing[0]}): apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "slurmd has to be started by root"


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[SlurmCluster]:
    """The cluster. Without SLURM the test is skipped, but never where MEGATRON_OPD_SLURM is set."""
    reason = _why_not()
    if reason and not os.environ.get("MEGATRON_OPD_SLURM"):
        pytest.skip(reason)
    assert not reason, reason
    folder = Path(tempfile.mkdtemp(prefix=os.path.basename(_FOLDER)))
    folder.chmod(0o755)  # munged has a user of its own, and looks at the folders above its files
    for name in ("munge", "state"):
        (folder / name).mkdir()
    (folder / "munge" / "key").write_bytes(os.urandom(128))
    for path, mode in ((folder / "munge" / "key", 0o400), (folder / "munge", 0o755)):
        path.chmod(mode)
        shutil.chown(path, "munge", "munge")
    ports = _free_ports(1 + len(NODES))
    nodes = "\n".join(
        f"NodeName={name} NodeAddr=127.0.0.1 NodeHostname=localhost Port={port} CPUs=4"
        for name, port in zip(NODES, ports[1:], strict=True)
    )
    # The ports of a run follow from its job's number: those of another session on this machine are others.
    settings = SETTINGS.format(folder=folder, ports=ports, nodes=nodes, first=random.randint(1, 60_000))
    (folder / "slurm.conf").write_text(settings)
    environment = {
        **os.environ,
        "SLURM_CONF": str(folder / "slurm.conf"),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/sbin"]),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    cluster = SlurmCluster(folder, environment)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
