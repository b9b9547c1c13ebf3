"""`megatron-opd launch slurm`: a run on a SLURM cluster."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_opd.cli_plan import ConfigFile, Overrides
from megatron_opd.errors import UserError

if TYPE_CHECKING:
    from megatron_opd.config.schema import Config
    from megatron_opd.launch.slurm import ServerNodes

Nodes = Annotated[
    int,
    typer.Option(
        min=1,
        help="Nodes with processes of the run: the student's, then those of a teacher with teacher.parallel.separate.",
    ),
]
Gpus = Annotated[int, typer.Option(min=0, help="0: the cluster has none.")]
PerNode = Annotated[int | None, typer.Option(min=1, help="Default: one a GPU.", show_default=False)]
RolloutNodes = Annotated[
    int,
    typer.Option(
        min=0, help="Further nodes, each with the servers of rollout.sglang. 0: rank 0's node has them."
    ),
]
TeacherNodes = Annotated[
    int,
    typer.Option(
        min=0, help="Further nodes, each with the servers of teacher.sglang. 0: rank 0's node has them."
    ),
]
Cpus = Annotated[int | None, typer.Option(min=1, help="CPUs of a process.", show_default=False)]
Text = Annotated[str | None, typer.Option(show_default=False)]
Limit = Annotated[
    str | None, typer.Option(help="Time limit, such as 24:00:00 or 1-00:00:00.", show_default=False)
]
JobName = Annotated[str | None, typer.Option(help="Default: the last part of run_dir.", show_default=False)]
SignalSeconds = Annotated[
    int, typer.Option(min=1, help="Seconds before the time limit at which the run saves and ends.")
]
Retries = Annotated[
    int, typer.Option(min=0, help="Times that a failed run is started again from the same checkpoint.")
]
Chain = Annotated[
    int,
    typer.Option(
        min=1, help="Jobs, each going on when the one before has ended, instead of one that is queued again."
    ),
]
Directives = Annotated[
    list[str] | None,
    typer.Option(help="Further directive, such as exclusive or qos=high.", show_default=False),
]
Setup = Annotated[
    list[str] | None,
    typer.Option(
        help="Shell line before the run, such as 'source .venv/bin/activate'; outside a container.",
        show_default=False,
    ),
]
Environment = Annotated[
    list[str] | None, typer.Option(help="NAME=VALUE for every process.", show_default=False)
]
LocalTmp = Annotated[str, typer.Option(help="Folder on the nodes' own disks, for caches.")]
Image = Annotated[
    str | None, typer.Option(help="Image that pyxis starts the processes in.", show_default=False)
]
Mounts = Annotated[
    list[str] | None, typer.Option(help="SRC:DST for pyxis, besides the current folder.", show_default=False)
]
ServerImage = Annotated[
    str | None, typer.Option(help="Image of the servers. Default: --container-image.", show_default=False)
]
RenderOnly = Annotated[bool, typer.Option("--render-only", help="Print the script instead.")]


def slurm(
    config: ConfigFile,
    overrides: Overrides = None,
    nodes: Nodes = 1,
    gpus_per_node: Gpus = 8,
    processes_per_node: PerNode = None,
    rollout_nodes: RolloutNodes = 0,
    teacher_nodes: TeacherNodes = 0,
    cpus_per_task: Cpus = None,
    partition: Text = None,
    account: Text = None,
    time: Limit = None,
    job_name: JobName = None,
    signal_seconds: SignalSeconds = 300,
    retries: Retries = 2,
    chain: Chain = 1,
    sbatch: Directives = None,
    setup: Setup = None,
    env: Environment = None,
    local_tmp: LocalTmp = "/tmp",
    container_image: Image = None,
    container_mounts: Mounts = None,
    server_image: ServerImage = None,
    render_only: RenderOnly = False,
) -> None:
    """Submit a batch script that trains on the nodes of a SLURM cluster.

    It is submitted in the current folder, which all nodes see, with the environment of now. Before a time limit and on
    SIGUSR1 or SIGTERM the run saves, and is queued again; so it is after a failure. A mistake is found before the job
    is submitted, as far as this machine can tell. --render-only looks at CONFIG and the models' config.json only.
    """
    from megatron_opd.config.load import load_config
    from megatron_opd.launch.slurm import SlurmJob, render, submit

    loaded = load_config(config, overrides or [])
    servers = _servers(loaded, rollout_nodes, teacher_nodes)
    per_node = processes_per_node or max(1, gpus_per_node)
    ranks, of_teacher = _ranks(loaded, config, nodes, per_node)
    for pair in env or []:
        if not re.fullmatch(r"[A-Za-z_]\w*=.*", pair, re.DOTALL):
            raise UserError(f"--env: '{pair}' is not NAME=VALUE")
    _check(load_config(config, [*(overrides or []), *_placeholders(servers)]), ranks, render_only)
    job = SlurmJob(
        arguments=[str(config), *(overrides or [])],
        run_dir=loaded.run_dir,
        name=job_name or loaded.run_dir.name,
        nodes=nodes,
        processes_per_node=per_node,
        ranks=ranks,
        teacher_ranks=of_teacher,
        servers=servers,
        gpus_per_node=gpus_per_node,
        cpus_per_task=cpus_per_task,
        time=time,
        partition=partition,
        account=account,
        signal_seconds=signal_seconds,
        retries=retries,
        chain=chain,
        directives=sbatch or [],
        setup=setup or [],
        environment=env or [],
        local_tmp=local_tmp,
        container_image=container_image,
        container_mounts=container_mounts or [],
        server_image=server_image,
    )
    if render_only:
        print(render(job), end="")
        return
    number = submit(render(job))
    log = Path(f"{job.name}-{number}{'_1' if chain > 1 else ''}.log").absolute()
    print(f"submitted job {number}; what it prints comes to {log}")


def _ranks(config: "Config", path: Path, nodes: int, per_node: int) -> tuple[int, int]:
    """Processes of the run, and how many of them are the teacher's alone. Raises UserError when the nodes differ."""
    from megatron_opd.config.layout_checks import processes_of_run, teacher_processes

    ranks = nodes * per_node if config.parallel.data is None else processes_of_run(config)
    if not (nodes - 1) * per_node < ranks <= nodes * per_node:
        raise UserError(
            f"--nodes: the layouts in {path} ask for {ranks} processes, {per_node} a node: give --nodes "
            f"{-(-ranks // per_node)}"
        )
    return ranks, teacher_processes(config)


def _check(config: "Config", ranks: int, render_only: bool) -> None:
    """What a rank checks at its start, as far as this machine can."""
    from megatron_opd.preflight import check_before_start, check_models

    if render_only:
        check_models(config, ranks)
    else:
        check_before_start(config, ranks, elsewhere=True)


def _servers(config: "Config", rollout_nodes: int, teacher_nodes: int) -> "list[ServerNodes]":
    """The nodes with servers. Raises UserError when CONFIG has no servers to start there, or too many."""
    from megatron_opd.launch.slurm import PORTS, ServerNodes

    found = []
    for role, engine, served, nodes in (
        ("rollout", config.rollout.engine, config.rollout.sglang, rollout_nodes),
        ("teacher", config.teacher.engine, config.teacher.sglang, teacher_nodes),
    ):
        if nodes and (engine != "sglang" or served.python is None):
            raise UserError(
                f"--{role}-nodes: the run starts no servers for them: set {role}.engine to sglang and "
                f"{role}.sglang.python, or leave it 0"
            )
        if nodes:
            found.append(ServerNodes(role=role, nodes=nodes, servers=served.servers))
    if sum(each.servers for each in found) >= PORTS:
        raise UserError(f"rollout.sglang.servers: a job has ports for {PORTS - 1} servers a node: lower it")
    return found


def _placeholders(servers: "list[ServerNodes]") -> list[str]:
    """What the script will add to the configuration of the ranks; the nodes are not known yet."""
    from megatron_opd.launch.slurm import STARTED_ELSEWHERE

    return [
        f"{each.role}.sglang.{pair}"
        for each in servers
        for pair in ("urls=[http://node]", *STARTED_ELSEWHERE)
    ]
