"""Which process of how many this one is, and where they meet: read from what started it.

Launchers, the innermost first; the first whose variables are there is believed:
  plain     JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID (JAX_LOCAL_DEVICE_IDS)
  GKE TPU   TPU_WORKER_HOSTNAMES or TPU_PROCESS_ADDRESSES, TPU_WORKER_ID; MEGASCALE_* of slices
  Open MPI  OMPI_COMM_WORLD_*
  Slurm     SLURM_* of a step: what srun sets, and sbatch alone does not
  JobSet    JOBSET_NAME, REPLICATED_JOB_NAME, JOB_COMPLETION_INDEX; JAX_NUM_PROCESSES beside them

A process owns all devices of its host; where a host has several processes, each owns its share.
jax.distributed can detect too, but gives a Slurm or Open MPI process one GPU even where it is the
only one of its host, asks Kubernetes for rights, and ends in a time-out where variables disagree.
"""

import dataclasses
import pathlib
import re
from collections.abc import Mapping

DEVICES = pathlib.Path("/dev")
PORT = 8482  # of the coordinator, where the launcher names no job whose number would give one
_PLAIN = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")

Environ = Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes of a run, as this one sees them."""

    coordinator: str  # host:port of process 0
    number: int
    index: int
    local_devices: tuple[int, ...] | None = None  # of its host; None: all
    launcher: str = "given"


@dataclasses.dataclass(frozen=True)
class _Found:
    """What a launcher says. Each number comes with the name of its variable, for messages."""

    launcher: str
    coordinator: str | None
    number: tuple[str, int] | None
    index: tuple[str, int]
    local: tuple[int, int] = (0, 1)  # place among the processes of the host, and how many


def detect(
    environ: Environ,
    coordinator: str | None = None,
    number: int | None = None,
    index: int | None = None,
) -> Processes | None:
    """This process among all of its run; None where it is alone.

    Args:
      environ: os.environ.
      coordinator, number, index: what the user gives (run.processes.*); goes before `environ`.

    Raises ValueError naming the variable, its value and what would be right, where something is
    missing, is no number, or contradicts another.
    """
    if number == 1:
        return None
    plain = {name: environ[name] for name in _PLAIN if environ.get(name)}
    found = _launcher(environ) if len(plain) < len(_PLAIN) else None
    if found is None and not plain and (coordinator, number, index) == (None,) * 3:
        return None
    own_number = _agreed("JAX_NUM_PROCESSES", _number(plain, "JAX_NUM_PROCESSES"), found, "number")
    own_index = _agreed("JAX_PROCESS_ID", _number(plain, "JAX_PROCESS_ID"), found, "index")
    known = {
        "run.processes.coordinator": coordinator
        or plain.get("JAX_COORDINATOR_ADDRESS")
        or (found and found.coordinator),
        "run.processes.number": own_number if number is None else number,
        "run.processes.index": own_index if index is None else index,
    }
    if known["run.processes.number"] == 1:
        return None
    _check_complete(known, found, plain)
    return Processes(
        *known.values(),
        local_devices=_local_devices(environ, found),
        launcher=found.launcher if found else "plain variables" if plain else "given",
    )


def _check_complete(known: dict, found: _Found | None, plain: Mapping[str, str]) -> None:
    """Raises ValueError where one of the three is not known, or they cannot be."""
    for (key, value), name in zip(known.items(), _PLAIN, strict=True):
        if value is None:
            there = found.launcher if found else ", ".join(plain) or "run.processes"
            raise ValueError(
                f"{name} is not set, and {there} alone does not say it: set {name} or {key} "
                "in every process"
            )
    address, number, index = known.values()
    there = re.fullmatch(r"\S+:(\d+)", address)
    if there is None or not 0 < int(there[1]) < 65536:
        raise ValueError(
            f"JAX_COORDINATOR_ADDRESS or run.processes.coordinator is {address!r}; it must be "
            "HOST:PORT of process 0"
        )
    if number < 1:
        raise ValueError(f"the number of processes is {number}; it must be at least 1")
    if not 0 <= index < number:
        raise ValueError(
            f"the index of this process is {index} and there are {number}; it must be 0 to "
            f"{number - 1}"
        )


def _agreed(name: str, plain: int | None, found: _Found | None, field: str) -> int | None:
    """The plain variable's number, or else the launcher's. Raises ValueError where both differ."""
    told = getattr(found, field) if found else None
    if plain is not None and told is not None and plain != told[1]:
        raise ValueError(
            f"{name} is {plain}, but {told[0]} of {found.launcher} is {told[1]}; unset {name}, or "
            f"set all of {', '.join(_PLAIN)}"
        )
    return plain if plain is not None else told and told[1]


def _number(environ: Environ, name: str) -> int | None:
    """Raises ValueError where the variable is something else than a whole number from 0."""
    text = environ.get(name)
    if text is None or text == "":
        return None
    if not re.fullmatch(r"\d+", text):
        raise ValueError(f"{name} is {text!r}; it must be a whole number")
    return int(text)


def _needed(environ: Environ, name: str, launcher: str, why: str) -> int:
    value = _number(environ, name)
    if value is None:
        raise ValueError(f"{name} is not set, though {why} is: {launcher} sets both")
    return value


def _local_devices(environ: Environ, found: _Found | None) -> tuple[int, ...] | None:
    """This process's devices of its host: an equal share, in order. None: all that it sees.

    Raises ValueError where its GPUs do not divide.
    """
    listed = environ.get("JAX_LOCAL_DEVICE_IDS")
    if listed:
        if not re.fullmatch(r"\d+(,\d+)*", listed):
            raise ValueError(
                f"JAX_LOCAL_DEVICE_IDS is {listed!r}; it must be numbers of devices, as in 0,1"
            )
        return tuple(int(text) for text in listed.split(","))
    rank, per_host = found.local if found else (0, 1)
    if per_host == 1:
        return None
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    count = gpus_of_host() if visible is None else len([d for d in visible.split(",") if d])
    if count <= 1:  # the launcher shows each process its own GPU, or there is none
        return None
    if count % per_host:
        said = "not set" if visible is None else repr(visible)
        raise ValueError(
            f"CUDA_VISIBLE_DEVICES is {said}, {count} GPUs for {per_host} processes of one "
            f"host; start a number of processes that divides {count}"
        )
    share = count // per_host
    return tuple(range(rank * share, (rank + 1) * share))


def gpus_of_host() -> int:
    """NVIDIA's, as the driver's device files say; JAX must not be asked before it is set up."""
    return len(list(DEVICES.glob("nvidia[0-9]*")))


# --- the launchers --------------------------------------------------------------------------------


def _launcher(environ: Environ) -> _Found | None:
    for read in (_gke_tpu, _open_mpi, _slurm, _job_set):
        if (found := read(environ)) is not None:
            return found
    return None


def _gke_tpu(environ: Environ) -> _Found | None:
    """One process a host; a slice's hosts are numbered within it, slices follow each other."""
    name = "TPU_PROCESS_ADDRESSES"
    if not environ.get(name):
        name = "TPU_WORKER_HOSTNAMES"
    if not environ.get(name):
        return None
    hosts = [address.strip() for address in environ[name].split(",")]
    worker = _needed(environ, "TPU_WORKER_ID", "GKE", name)
    if worker >= len(hosts):
        raise ValueError(
            f"TPU_WORKER_ID is {worker}, but {name} names {len(hosts)} hosts; it must be 0 to "
            f"{len(hosts) - 1}"
        )
    slices = _number(environ, "MEGASCALE_NUM_SLICES") or 1
    this = 0
    if slices > 1:
        this = _needed(environ, "MEGASCALE_SLICE_ID", "GKE", "MEGASCALE_NUM_SLICES")
        if not environ.get("MEGASCALE_COORDINATOR_ADDRESS"):
            raise ValueError(
                f"MEGASCALE_NUM_SLICES is {slices}, but MEGASCALE_COORDINATOR_ADDRESS is not set; "
                "it must name the first host of the first slice"
            )
    first = environ.get("MEGASCALE_COORDINATOR_ADDRESS") or hosts[0]
    return _Found(
        "GKE",
        f"{first.split(':')[0]}:{PORT}",
        (f"{name} x MEGASCALE_NUM_SLICES", len(hosts) * slices),
        ("TPU_WORKER_ID", worker + this * len(hosts)),
    )


def _open_mpi(environ: Environ) -> _Found | None:
    if "OMPI_COMM_WORLD_SIZE" not in environ:
        return None
    size = _number(environ, "OMPI_COMM_WORLD_SIZE")
    need = lambda name: _needed(environ, f"OMPI_COMM_WORLD_{name}", "mpirun", "its SIZE")
    local_size = need("LOCAL_SIZE")
    # Version 4 names the host of mpirun and the job: where process 0 runs unless a host file says
    # otherwise. Version 5 does not.
    uri = re.match(
        r"(\d+)\.\d+;tcp6?://\[?([^],:]+|[0-9a-f:]+)[],:]",
        environ.get("OMPI_MCA_orte_hnp_uri", ""),
    )
    where = f"{uri[2]}:{_port(int(uri[1]) >> 12)}" if uri else None
    if where is None and local_size == size:
        where = f"localhost:{PORT}"
    return _Found(
        "Open MPI", where, ("OMPI_COMM_WORLD_SIZE", size), ("OMPI_COMM_WORLD_RANK", need("RANK")),
        (need("LOCAL_RANK"), local_size),
    )  # fmt: skip


def _slurm(environ: Environ) -> _Found | None:
    if "SLURM_JOB_ID" not in environ or "SLURM_PROCID" not in environ:
        return None
    nodes = environ.get("SLURM_STEP_NODELIST")
    if nodes is None:  # in the script of sbatch or a shell of salloc itself
        tasks = _number(environ, "SLURM_NTASKS") or 1
        if tasks == 1:
            return None
        raise ValueError(
            f"SLURM_NTASKS is {tasks}, but SLURM_STEP_NODELIST is not set: start the processes "
            "with srun, or say run.processes.number=1 for one alone"
        )
    step = lambda name: _needed(environ, name, "srun", "SLURM_STEP_NODELIST")
    number = ("SLURM_STEP_NUM_TASKS", step("SLURM_STEP_NUM_TASKS"))
    node = _needed(environ, "SLURM_NODEID", "srun", "SLURM_PROCID")
    per_node = _per_node(environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    if sum(per_node) != number[1] or node >= len(per_node):
        raise ValueError(
            f"SLURM_STEP_TASKS_PER_NODE is {environ.get('SLURM_STEP_TASKS_PER_NODE')!r}, but "
            f"SLURM_STEP_NUM_TASKS is {number[1]} and SLURM_NODEID {node}; srun sets them together"
        )
    return _Found(
        "Slurm",
        f"{_first_host(nodes)}:{_port(step('SLURM_JOB_ID'))}",
        number,
        ("SLURM_PROCID", step("SLURM_PROCID")),
        (step("SLURM_LOCALID"), per_node[node]),
    )


def _per_node(text: str) -> list[int]:
    """`8(x2),4` -> [8, 8, 4]."""
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, times in parts for _ in range(int(times or 1))]


def _first_host(nodes: str) -> str:
    """`gpu[003-004,9],b` -> gpu003."""
    listed = re.match(r"([^,\[]+)(?:\[(\w+))?", nodes)
    if listed is None:
        raise ValueError(f"SLURM_STEP_NODELIST is {nodes!r}; it must name a host")
    return listed[1] + (listed[2] or "")


def _job_set(environ: Environ) -> _Found | None:
    """Of one replicated job with a pod a host; the manifest says how many (launch/)."""
    if "JOBSET_NAME" not in environ:
        return None
    index = _needed(environ, "JOB_COMPLETION_INDEX", "an indexed Job", "JOBSET_NAME")
    name, job = environ["JOBSET_NAME"], environ.get("REPLICATED_JOB_NAME")
    if not job:
        raise ValueError("REPLICATED_JOB_NAME is not set, though JOBSET_NAME is: see launch/")
    if number := _number(environ, "JOB_INDEX"):
        raise ValueError(
            f"JOB_INDEX is {number}: there are several Jobs, each counting its pods from 0; set "
            f"replicas of {job} to 1 and its parallelism to the number of hosts"
        )
    where = f"{name}-{job}-0-0.{name}:{PORT}"  # a pod's name in the headless service of the set
    return _Found("JobSet", where, None, ("JOB_COMPLETION_INDEX", index))


def _port(job: int) -> int:
    """A port of the highest 4,096, other jobs' others: two jobs may share a host."""
    return 65536 - 4096 + job % 4096
