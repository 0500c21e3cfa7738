"""Which process this is, from the environments that launchers make, and from contradictory ones.

RECORDED holds what a process finds, cut to the variables that matter: names and form as in
  Slurm      `srun printenv`; srun(1), "output environment variables"
  Open MPI   `mpirun printenv` of 4.1 and 5.0; OMPI_MCA_orte_hnp_uri as jax's ompi_cluster.py cites
  JobSet     Kubernetes' indexed Jobs, and the fields that launch/k8s-jobset.yaml passes down
  GKE        what its TPU webhook and multislice JobSets inject; jax's cloud_tpu_cluster.py
"""

import pytest

from jaxreason.parallel import launchers
from jaxreason.parallel.launchers import Processes, detect

SLURM = {
    "SLURM_JOB_ID": "831492", "SLURM_JOB_NUM_NODES": "4", "SLURM_NTASKS": "4",
    "SLURM_NODELIST": "dgx[003-005,011]", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "4",
    "SLURM_STEP_NODELIST": "dgx[003-005,011]", "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "1(x4)", "SLURM_PROCID": "2", "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",
}  # fmt: skip
SLURM_PER_GPU = SLURM | {
    "SLURM_NTASKS": "16", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "dgx003,dgx007",
    "SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3", "SLURM_NODEID": "1",
}  # fmt: skip
SBATCH_ALONE = {
    name: SLURM[name]
    for name in ("SLURM_JOB_ID", "SLURM_JOB_NUM_NODES", "SLURM_NTASKS", "SLURM_NODELIST")
} | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
OPEN_MPI_4 = {
    "OMPI_COMM_WORLD_SIZE": "16", "OMPI_COMM_WORLD_RANK": "9", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "8", "OMPI_COMM_WORLD_NODE_RANK": "1",
    "OMPI_UNIVERSE_SIZE": "16",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1,10.108.0.1:34911",
    "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",
}  # fmt: skip
OPEN_MPI_5 = {
    "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_NODE_RANK": "1",
    "OMPI_VERSION": "5.0.6", "PMIX_RANK": "1", "PMIX_NAMESPACE": "prterun-dgx003-2511@1",
}  # fmt: skip
JOB_SET = {
    "KUBERNETES_SERVICE_HOST": "10.96.0.1", "HOSTNAME": "reason-workers-0-5",
    "JOB_COMPLETION_INDEX": "5", "JOBSET_NAME": "reason", "REPLICATED_JOB_NAME": "workers",
    "JOB_INDEX": "0", "JAX_NUM_PROCESSES": "8",
}  # fmt: skip
GKE = {
    "TPU_WORKER_HOSTNAMES": "tpu-0.svc,tpu-1.svc,tpu-2.svc,tpu-3.svc", "TPU_WORKER_ID": "3",
    "TPU_ACCELERATOR_TYPE": "v5p-32", "TPU_TOPOLOGY": "2x2x4", "TPU_SKIP_MDS_QUERY": "true",
    "KUBERNETES_SERVICE_HOST": "10.96.0.1", "JOB_COMPLETION_INDEX": "3",
}  # fmt: skip
GKE_SLICES = GKE | {
    "MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1", "JOBSET_NAME": "reason",
    "MEGASCALE_COORDINATOR_ADDRESS": "reason-slice-0-0.reason:8080",
}  # fmt: skip
PLAIN = {
    "JAX_COORDINATOR_ADDRESS": "10.0.0.7:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "1",
}  # fmt: skip

# 831492 % 4096 = 4; the job of 1531576320 is 373920, and that % 4096 = 1184.
RECORDED = {
    "slurm, one a host": (SLURM, Processes("dgx003:61444", 4, 2, None, "Slurm")),
    "slurm, one a gpu": (SLURM_PER_GPU, Processes("dgx003:61444", 16, 11, (3,), "Slurm")),
    "slurm, four of two gpus": (
        SLURM_PER_GPU
        | {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_PROCID": "7"},
        Processes("dgx003:61444", 8, 7, (6, 7), "Slurm"),
    ),
    "slurm, gpus bound to tasks": (
        SLURM_PER_GPU | {"CUDA_VISIBLE_DEVICES": "3"},
        Processes("dgx003:61444", 16, 11, None, "Slurm"),
    ),
    "slurm, no gpu variable": (
        {k: v for k, v in SLURM_PER_GPU.items() if k != "CUDA_VISIBLE_DEVICES"},
        Processes("dgx003:61444", 16, 11, (3,), "Slurm"),
    ),
    "open mpi 4": (OPEN_MPI_4, Processes("10.96.0.1:62624", 16, 9, (1,), "Open MPI")),
    "open mpi 5, one host": (
        OPEN_MPI_5,
        Processes("localhost:8482", 2, 1, (4, 5, 6, 7), "Open MPI"),
    ),
    "open mpi in a slurm step": (
        SLURM | OPEN_MPI_4,
        Processes("10.96.0.1:62624", 16, 9, (1,), "Open MPI"),
    ),
    "jobset": (JOB_SET, Processes("reason-workers-0-0.reason:8482", 8, 5, None, "JobSet")),
    "gke": (GKE, Processes("tpu-0.svc:8482", 4, 3, None, "GKE")),
    "gke, slices": (GKE_SLICES, Processes("reason-slice-0-0.reason:8482", 8, 7, None, "GKE")),
    "plain": (PLAIN, Processes("10.0.0.7:1234", 4, 1, None, "plain variables")),
    "plain, of one gpu": (
        PLAIN | {"JAX_LOCAL_DEVICE_IDS": "2"},
        Processes("10.0.0.7:1234", 4, 1, (2,), "plain variables"),
    ),
    "plain inside a slurm step": (
        SLURM | PLAIN,
        Processes("10.0.0.7:1234", 4, 1, None, "plain variables"),
    ),
    "slurm, own coordinator": (
        SLURM | {"JAX_COORDINATOR_ADDRESS": "ib3:99"},
        Processes("ib3:99", 4, 2, None, "Slurm"),
    ),
}


@pytest.fixture(autouse=True)
def eight_gpus(monkeypatch, tmp_path):
    """What the driver of the recorded hosts leaves in /dev."""
    names = ["nvidiactl", "nvidia-uvm", "nvidia-caps", *[f"nvidia{i}" for i in range(8)]]
    for name in names:
        (tmp_path / name).touch()
    monkeypatch.setattr(launchers, "DEVICES", tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", RECORDED)
def test_a_recorded_environment_is_understood(name):
    environ, expected = RECORDED[name]
    assert detect(environ) == expected


def test_without_gpus_a_process_has_all_devices_that_it_sees(eight_gpus):
    for file in eight_gpus.glob("nvidia?"):
        file.unlink()
    assert detect(OPEN_MPI_5).local_devices is None


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"},
        SLURM
        | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}
        | {"SLURM_PROCID": "0", "SLURM_NODEID": "0"},
        {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"},
        PLAIN | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"},
    ],
)
def test_one_process_is_alone(environ):
    assert detect(environ) is None


def test_what_is_given_goes_before_the_environment():
    assert detect(SLURM, number=1) is None
    assert detect({}, "h:1", 2, 1) == Processes("h:1", 2, 1)
    assert detect(SLURM, "h:1") == Processes("h:1", 4, 2, None, "Slurm")
    assert detect(PLAIN, number=8, index=7).index == 7


MISTAKES = {
    "half given": ({"JAX_PROCESS_ID": "1"}, r"JAX_COORDINATOR_ADDRESS is not set"),
    "without a number": (
        {k: PLAIN[k] for k in ("JAX_COORDINATOR_ADDRESS", "JAX_PROCESS_ID")},
        r"JAX_NUM_PROCESSES is not set, .* run\.processes\.number",
    ),
    "no number": (PLAIN | {"JAX_PROCESS_ID": "one"}, r"JAX_PROCESS_ID is 'one'; .* whole number"),
    "beyond the last": (PLAIN | {"JAX_PROCESS_ID": "4"}, r"is 4 and there are 4; .* 0 to 3"),
    "no port": (PLAIN | {"JAX_COORDINATOR_ADDRESS": "host"}, r"'host'; it must be HOST:PORT"),
    "a port beyond the last": (
        PLAIN | {"JAX_COORDINATOR_ADDRESS": "host:99999"},
        r"'host:99999'; it must be HOST:PORT",
    ),
    "contradiction": (
        SLURM | {"JAX_NUM_PROCESSES": "8"},
        r"JAX_NUM_PROCESSES is 8, but SLURM_STEP_NUM_TASKS of Slurm is 4",
    ),
    "without srun": (SBATCH_ALONE, r"SLURM_NTASKS is 4, .* with srun"),
    "tasks of another step": (
        SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2(x4)"},
        r"SLURM_STEP_TASKS_PER_NODE is '2\(x4\)', but SLURM_STEP_NUM_TASKS is 4",
    ),
    "gpus that do not divide": (
        SLURM_PER_GPU | {"CUDA_VISIBLE_DEVICES": "0,1,2"},
        r"'0,1,2', 3 GPUs for 8 processes",
    ),
    "gpus of the host that do not divide": (
        OPEN_MPI_5 | {"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_LOCAL_SIZE": "3"},
        r"CUDA_VISIBLE_DEVICES is not set, 8 GPUs for 3 processes",
    ),
    "open mpi 5 on two hosts": (
        OPEN_MPI_5 | {"OMPI_COMM_WORLD_SIZE": "4"},
        r"JAX_COORDINATOR_ADDRESS is not set, and Open MPI alone",
    ),
    "jobset of unknown size": (
        {k: v for k, v in JOB_SET.items() if k != "JAX_NUM_PROCESSES"},
        r"JAX_NUM_PROCESSES is not set, and JobSet alone",
    ),
    "jobset of several jobs": (JOB_SET | {"JOB_INDEX": "1"}, r"JOB_INDEX is 1: .* replicas"),
    "jobset without indices": (
        {k: v for k, v in JOB_SET.items() if k != "JOB_COMPLETION_INDEX"},
        r"JOB_COMPLETION_INDEX is not set, though JOBSET_NAME is",
    ),
    "gke without a worker": (
        {k: v for k, v in GKE.items() if k != "TPU_WORKER_ID"},
        r"TPU_WORKER_ID is not set",
    ),
    "gke worker of another slice": (GKE | {"TPU_WORKER_ID": "4"}, r"is 4, but .* names 4 hosts"),
    "slices that cannot meet": (
        GKE | {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "0"},
        r"MEGASCALE_COORDINATOR_ADDRESS is not set",
    ),
    "local devices": (
        PLAIN | {"JAX_LOCAL_DEVICE_IDS": "gpu0"},
        r"JAX_LOCAL_DEVICE_IDS is 'gpu0'",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_with_what_would_be_right(name):
    environ, message = MISTAKES[name]
    with pytest.raises(ValueError, match=message) as error:
        detect(environ)
    assert "\n" not in str(error.value)
