"""Writes the batch script of a run on a SLURM cluster, and hands it to `sbatch`.

One allocation: first the nodes of all ranks, student's before teacher's, then nodes with SGLang servers. `srun` starts
every rank itself, so that signals reach the ranks and nothing else. The script decides what follows the end of a run by
the exit code that its ranks leave (`worker.leave_exit_code`): what `srun` returns is the code of ranks that it has
killed.
"""

import shlex
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

from megatron_opd.errors import UserError
from megatron_opd.launch.worker import EXIT_FILE, REQUEUE_EXIT

PORTS = 16
"""Ports of a job: one for the ranks to find each other, the others for the servers on a node."""
SERVER_ROLES = {"rollout": "draw the rollouts", "teacher": "are the teacher"}


@dataclass(frozen=True, kw_only=True)
class ServerNodes:
    """Nodes with SGLang servers and nothing else. `role` is the section of the configuration: rollout or teacher."""

    role: str
    nodes: int
    servers: int  # on each of them


@dataclass(frozen=True, kw_only=True)
class SlurmJob:
    """What a batch script is made of. Paths are relative to the folder that the job is submitted in, or absolute."""

    arguments: Sequence[str]  # of `megatron-opd train`: the configuration and its overrides
    run_dir: Path
    name: str
    nodes: int  # with ranks; the last one may have fewer of them than the others
    processes_per_node: int
    ranks: int
    teacher_ranks: int = 0  # the last ones
    servers: Sequence[ServerNodes] = ()
    gpus_per_node: int = 0
    cpus_per_task: int | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    signal_seconds: int = 300
    retries: int = 2
    chain: int = 1
    directives: Sequence[str] = ()  # of sbatch, without the dashes
    setup: Sequence[str] = ()  # shell lines
    environment: Sequence[str] = ()  # NAME=VALUE
    local_tmp: str = "/tmp"
    container_image: str | None = None
    container_mounts: Sequence[str] = ()
    server_image: str | None = None  # None: container_image

    @property
    def all_nodes(self) -> int:
        """Nodes of the allocation."""
        return self.nodes + sum(each.nodes for each in self.servers)

    def first_node(self, index: int) -> int:
        """The first node of `servers[index]`."""
        return self.nodes + sum(each.nodes for each in self.servers[:index])

    def first_port(self, index: int) -> int:
        """The first port of `servers[index]`, counted from the job's first. Each starts as many servers on a node."""
        return 1 + sum(each.servers for each in self.servers[:index])


def submit(script: str) -> str:
    """Hands the script to `sbatch`; returns the number of the job. Raises UserError with what sbatch says."""
    try:
        done = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, text=True)
    except OSError as error:
        raise UserError(
            f"cannot run sbatch ({error.strerror}): submit on a machine of a SLURM cluster, or print the script with "
            "--render-only"
        ) from None
    if done.returncode:
        raise UserError(f"sbatch: {' '.join(done.stderr.split())}")
    return done.stdout.strip().partition(";")[0]


def render(job: SlurmJob) -> str:
    """The batch script."""
    parts = [
        "#!/bin/bash",
        *(f"# {line}" for line in _legend(job)),
        *(f"#SBATCH --{directive}" for directive in _directives(job)),
        _SETTINGS.substitute(
            config=shlex.join(job.arguments),
            run_dir=shlex.quote(str(job.run_dir)),
            local_tmp=shlex.quote(job.local_tmp),
            exit_file=EXIT_FILE,
            machine="".join(f"{line}\n" for line in _machine(job)),
            ports=PORTS,
            newest=_NEWEST if job.chain == 1 else "",
        ),
    ]
    if job.servers:
        parts.append(_URLS + "\n".join(_server_step(job, index) for index in range(len(job.servers))))
    parts.append(_ranks_step(job))
    parts.append(_WATCH.substitute(signal_seconds=job.signal_seconds) if job.servers else _WAIT)
    parts.append((_CHAIN if job.chain > 1 else _REQUEUE).substitute(code=REQUEUE_EXIT, retries=job.retries))
    return "\n".join(parts)


def _legend(job: SlurmJob) -> Iterator[str]:
    """What runs where, in words."""

    def span(noun: str, first: int, count: int) -> str:
        return f"{noun} {first}" if count == 1 else f"{noun}s {first} to {first + count - 1}"

    def on(first: int, count: int) -> str:
        first_node = first // job.processes_per_node
        return span("node", first_node, (first + count - 1) // job.processes_per_node - first_node + 1)

    student = job.ranks - job.teacher_ranks
    yield "Rendered by `megatron-opd launch slurm`. Each start goes on from the newest checkpoint in run_dir."
    yield f"  {on(0, student)}: {'student' if job.teacher_ranks else 'the models'}, {span('rank', 0, student)}"
    if job.teacher_ranks:
        yield f"  {on(student, job.teacher_ranks)}: teacher, {span('rank', student, job.teacher_ranks)}"
    for index, each in enumerate(job.servers):
        where = span("node", job.first_node(index), each.nodes)
        yield f"  {where}: SGLang servers that {SERVER_ROLES[each.role]}, {each.servers} a node"


def _directives(job: SlurmJob) -> Iterator[str]:
    """The lines of sbatch, those of the user last."""
    yield f"job-name={job.name}"
    for key, value in (("partition", job.partition), ("account", job.account), ("time", job.time)):
        if value is not None:
            yield f"{key}={value}"
    yield f"nodes={job.all_nodes}"
    yield f"ntasks-per-node={job.processes_per_node}"
    if job.gpus_per_node:
        yield f"gpus-per-node={job.gpus_per_node}"
    if job.cpus_per_task:
        yield f"cpus-per-task={job.cpus_per_task}"
    yield f"output=%x-{'%A_%a' if job.chain > 1 else '%j'}.log"
    yield "open-mode=append"
    yield f"signal=USR1@{job.signal_seconds}"
    yield "requeue"
    if job.chain > 1:
        yield f"array=1-{job.chain}%1"
    yield from job.directives


def _machine(job: SlurmJob) -> Iterator[str]:
    """What the user has put before the run."""
    yield from job.setup
    for pair in job.environment:
        name, _, value = pair.partition("=")
        yield f"export {name}={shlex.quote(value)}"


def _srun(job: SlurmJob, nodes: int, ranks: int, per_node: int, first: int, image: str | None) -> str:
    """The beginning of a step: its options, a line for each kind."""
    # A last node with fewer ranks than the others: --ntasks-per-node would be ignored.
    spread = "ntasks-per-node" if ranks == nodes * per_node else "distribution=plane"
    lines = [f"srun --nodes={nodes} --ntasks={ranks} --{spread}={per_node} --relative={first}"]
    if job.cpus_per_task:  # a step does not take it from the job
        lines[0] += f" --cpus-per-task={job.cpus_per_task * job.processes_per_node // per_node}"
    lines.append("--kill-on-bad-exit=1")
    if image is not None:
        mounts = ",".join(['"$PWD:$PWD"', *map(shlex.quote, job.container_mounts)])
        lines.append(f'--container-image={shlex.quote(image)} --container-workdir="$PWD"')
        lines.append(f"--container-mounts={mounts}")
    return " \\\n    ".join(lines)


def _server_step(job: SlurmJob, index: int) -> str:
    """Servers in the background, and where the run finds them."""
    each = job.servers[index]
    first, port = job.first_node(index), job.first_port(index)
    step = _srun(job, each.nodes, each.nodes, 1, first, job.server_image or job.container_image)
    lines = (
        f"{step} \\\n"
        f'    megatron-opd serve --port=$((port + {port})) -- {each.role} "${{config[@]}}" &\n'
        "servers+=($!)\n"
        f'urls+=({each.role}.sglang.urls="$(urls {first} {each.nodes} {port} {each.servers})")\n'
        f"urls+=({' '.join(shlex.quote(f'{each.role}.sglang.{pair}') for pair in STARTED_ELSEWHERE)})\n"
    )
    if each.role == "teacher":  # for those of rollouts the run waits itself
        lines += (
            f'until listen "$(urls {first} {each.nodes} {port} {each.servers})" || ! kill -0 $! 2> /dev/null; '
            "do sleep 2; done\n"
        )
    return lines


STARTED_ELSEWHERE = ("python=null", "servers=1", "host=127.0.0.1", "gpus=[]", "arguments=[]")
"""Of a section `sglang`, what speaks of servers that the run starts: with `urls` it has its defaults."""


def _ranks_step(job: SlurmJob) -> str:
    step = _srun(job, job.nodes, job.ranks, job.processes_per_node, 0, job.container_image)
    more = ' "${urls[@]}"' if job.servers else ""
    return (
        "# The ranks. `exec`: signals reach them, not a shell.\n"
        "# shellcheck disable=SC2016\n"
        f"{step} \\\n"
        "    bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS; exec \"$@\"' rank "
        "\\\n"
        f'    megatron-opd train -- "${{config[@]}}"{more} &\n'
        "run=$!"
    )


_SETTINGS = Template("""
config=($config)
run_dir=$run_dir
${machine}set -u

# Caches on the disks of the nodes, kept from job to job.
caches=$local_tmp/megatron-opd-$$SLURM_JOB_USER
export TRITON_CACHE_DIR=$$caches/triton TORCHINDUCTOR_CACHE_DIR=$$caches/inductor HF_HOME=$$caches/huggingface
export OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$${SLURM_CPUS_PER_TASK:-1}}

# $ports ports that another job has only if its number is as far off as a multiple of 900.
port=$$((15000 + SLURM_JOB_ID % 900 * $ports))
mapfile -t nodes < <(scontrol show hostnames "$$SLURM_JOB_NODELIST")
address() { scontrol show node "$$1" | sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p'; }
MASTER_ADDR=$$(address "$${nodes[0]}")
export MASTER_ADDR MASTER_PORT=$$port

# The first rank that ends leaves its exit code here: srun tells that of ranks that it has killed itself.
mkdir -p "$$run_dir"
export $exit_file=$$run_dir/slurm-exit-$$SLURM_JOB_ID
rm -f "$$$exit_file"
$newest""")

_NEWEST = """
# The newest checkpoint: to stop without another one counts as a failure.
newest() { readlink "$run_dir/checkpoints/latest" || echo none; }
at_start=$(newest)
"""

_URLS = """\
# SGLang servers, and the key that they ask for.
SGLANG_API_KEY=$(od -An -N24 -tx1 /dev/urandom | tr -d ' \\n')
export SGLANG_API_KEY
servers=() urls=()
urls() { # of the servers on $2 nodes from $1 on, $4 of them on each, ports from $3 on
    local list='' node number
    for node in "${nodes[@]:$1:$2}"; do
        for ((number = 0; number < $4; number++)); do
            list+=,http://$(address "$node"):$((port + $3 + number))
        done
    done
    echo "[${list:1}]"
}
listen() { # whether the servers at all URLs of the list $1 do
    local url
    for url in ${1//[][,]/ }; do
        url=${url#http://}
        (exec 3<> "/dev/tcp/${url%:*}/${url##*:}") 2> /dev/null || return 1
    done
}
"""

_WAIT = """\
wait "$run"
code=$?
"""

_WATCH = Template("""\
wait -n # for the run, or for servers that end before it
if kill -0 "$$run" 2> /dev/null; then
    echo "servers have ended before the run, which has $signal_seconds s to save: see the logs in $$run_dir/servers" >&2
    kill -USR1 "$$run"
    for ((left = $signal_seconds; left > 0; left--)); do
        kill -0 "$$run" 2> /dev/null || break
        sleep 1
    done
    kill "$$run" 2> /dev/null
fi
wait "$$run"
code=$$?
kill "$${servers[@]}" 2> /dev/null
wait
""")

_END = f"""\
if [ -s "${EXIT_FILE}" ]; then code=$(< "${EXIT_FILE}"); fi
rm -f "${EXIT_FILE}"
"""

_REQUEUE = Template(
    _END.replace("$", "$$")
    + """\
failures=$$run_dir/slurm-failures-$$SLURM_JOB_ID
again() {
    echo "$$1: job $$SLURM_JOB_ID is queued again" >&2
    scontrol requeue "$$SLURM_JOB_ID"
}
retry() { # $retries times at most from the same checkpoint
    local checkpoint
    checkpoint=$$(newest)
    echo "$$checkpoint" >> "$$failures"
    if [ "$$(grep -cxF "$$checkpoint" "$$failures")" -le $retries ]; then
        again "$$1"
    else
        echo "$$1, from checkpoint $$checkpoint as before: job $$SLURM_JOB_ID is not queued again" >&2
    fi
}
case $$code in
    0) rm -f "$$failures" ;;
    2) echo "a mistake to mend: job $$SLURM_JOB_ID is not queued again" >&2 ;;
    $code) if [ "$$(newest)" != "$$at_start" ]; then again "saved"; else retry "stopped with nothing new saved"; fi ;;
    *) retry "exit code $$code" ;; # a node, a GPU or the network, mostly
esac
exit "$$code"
"""
)

_CHAIN = Template(
    _END.replace("$", "$$")
    + """\
case $$code in
    $code) code=0 ;; # the next job of the array goes on
    0 | 2) scancel --state=PENDING "$$SLURM_ARRAY_JOB_ID" ;; # finished, or a mistake to mend
esac
exit "$$code"
"""
)
