"""train.yml and the README's TrainJob: checked against the API's schemas, and their commands run as pods run them."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import kubernetes_validate
import places
import pytest
import runs
import yaml
from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob as TrainJob
from pods import TOP, pod_of, render, wait_until

TWO_EPOCHS = [*runs.SMALL, "--workers=1", "--checkpoint-every=2", "--max-epochs=2"]


# ---------------------------------------------------------------- train.yml


@pytest.mark.quick
def test_documents_are_valid_for_kubernetes():
    documents = render()
    assert [document["kind"] for document in documents] == ["PersistentVolumeClaim", "Job"]
    for document in documents:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize(
    "shards",
    ["pipe:gsutil cat gs://bucket/%s", "http://host/a b/", """pipe:sh -c 'cat "/data/%s" # {x}: [y] & *z \\n'"""],
)
def test_image_and_shards_are_passed_unchanged_and_nothing_else_is_replaced(shards):
    names = subprocess.run(["envsubst", "--variables", (TOP / "train.yml").read_text()], capture_output=True, text=True)
    assert set(names.stdout.split()) == {"image", "shards"}
    _, container = pod_of(image="registry/x:1@sha256:00", shards=shards)
    assert f"--shards={shards}" in container["args"] and container["image"] == "registry/x:1@sha256:00"


def test_volumes_and_their_claim_exist():
    """The schemas do not see a name without its object, nor a name that DNS does not allow."""
    claim, job = render()
    pod, container = pod_of()
    volumes = {volume.pop("name"): volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert set(mounts.values()) == set(volumes) and set(mounts) == {"/output", "/dev/shm", "/tmp"}
    assert volumes[mounts["/output"]]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    for name in [claim["metadata"]["name"], job["metadata"]["name"], container["name"], *volumes]:
        assert re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", name)


def test_shared_memory_holds_the_batches_of_all_loader_processes():
    """Two batches for training and two for validation, of 256 images of 224 x 224 x 3 bytes, for each process."""
    batches = 4 * 256 * 224 * 224 * 3
    pod, container = pod_of()
    limits = container["resources"]["limits"]
    [workers] = [int(word.split("=")[1]) for word in container["args"] if word.startswith("--workers=")]
    [shm] = [volume["emptyDir"]["sizeLimit"] for volume in pod["volumes"] if volume["name"] == "shm"]
    shm, memory = (int(quantity.removesuffix("Gi")) << 30 for quantity in (shm, limits["memory"]))
    assert limits["nvidia.com/gpu"] * workers * batches <= shm <= memory / 4  # it counts as memory
    assert limits["nvidia.com/gpu"] * (workers + 1) <= limits["cpu"]
    shm = int(re.search(r"shm:-(\d+)g", (TOP / "config.sh").read_text())[1]) << 30
    assert 8 * 12 * batches <= shm


def test_pods_meet_the_restricted_pod_security_standard():
    """What a namespace with pod-security.kubernetes.io/enforce: restricted asks for; and no access to the API."""
    pod, container = pod_of()
    context = pod["securityContext"]
    assert context["runAsNonRoot"] and context["runAsUser"] and context["seccompProfile"]["type"] == "RuntimeDefault"
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys() and pod["automountServiceAccountToken"] is False
    kinds = {kind for volume in pod["volumes"] for kind in volume.keys() - {"name"}}
    assert kinds <= {"configMap", "emptyDir", "persistentVolumeClaim"}
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_gcsfs_and_gsutil_read_as_the_service_account_of_the_pod(tmp_path):
    """As Google Cloud's metadata server tells it; gsutil with the option that train.yml names."""
    accounts, scope = "computeMetadata/v1/instance/service-accounts/", "https://www.googleapis.com/auth/devstorage"
    pages = {
        "index": "", "bucket/name": "the object", accounts + "index": "default/", accounts + "default/scopes": scope,
        accounts + "default/index": json.dumps({"email": "default", "scopes": [scope]}),
        accounts + "default/token": json.dumps({"access_token": "x", "expires_in": 3600}),
    }  # fmt: skip
    for name, text in pages.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    more = "index index; default_type application/json; add_header Metadata-Flavor Google always;"
    gcsfs = "import gcsfs; print(gcsfs.GCSFileSystem().cat_file('bucket/name').decode(), end='')"
    [option] = re.findall(r"needs -o (\S+)", (TOP / "train.yml").read_text())
    for command in ([sys.executable, "-c", gcsfs], ["gsutil", "-o", option, "cat", "gs://bucket/name"]):
        with places.gcs(tmp_path) as env, places.nginx(tmp_path, tmp_path / "log", more=more) as url:
            env |= dict.fromkeys(["GCE_METADATA_ROOT", "GCE_METADATA_IP"], url.split("/")[2])
            env |= {"FSSPEC_GCS_TOKEN": "google_default", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
            assert places.call(env, *command) == "the object"
        assert "200 /" + accounts + "default/token" in (tmp_path / "log").read_text()
        (tmp_path / "log").unlink()


# ---------------------------------------------------------------- the Job's command


def job_command(shards: Path, output: Path, *flags: str) -> list[str]:
    """What the Job's container runs, on small images and on this machine's CPU."""
    script, *args = pod_of()[1]["args"]
    args = [word for word in args if not word.startswith(("--shards=", "--output=", "--workers="))]
    return [sys.executable, f"{TOP}/{script}", f"--shards={shards}", f"--output={output}", *args, *TWO_EPOCHS, *flags]


@contextlib.contextmanager
def running(command: list[str], log: Path, **env: str) -> Iterator[subprocess.Popen]:
    """A container: when its command has ended, the engine kills what is left of its processes."""
    env = os.environ | {"OMP_NUM_THREADS": "1"} | env
    with open(log, "ab") as output, subprocess.Popen(
        command, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
    ) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def succeed(command: list[str], log: Path) -> None:
    with running(command, log) as process:
        assert process.wait(600) == 0, log.read_text()[-3000:]


@pytest.fixture(scope="module")
def alone(shards, tmp_path_factory) -> Path:
    """The output of an undisturbed run on two ranks, with the Job's command."""
    folder = tmp_path_factory.mktemp("alone")
    succeed(job_command(shards, folder / "out", "--devices=2"), folder / "log")
    return folder / "out"


def rank_1(process: subprocess.Popen) -> int:
    """The process that Lightning started for the second device."""
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        if b"\0LOCAL_RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes():
            return int(pid)
    raise AssertionError("there is no second rank")


@pytest.mark.long
def test_a_job_whose_pods_are_killed_ends_with_the_weights_of_an_undisturbed_run(shards, alone, tmp_path):
    """One pod loses a rank, as for lack of memory; the next is told to go; the third ends."""
    command = job_command(shards, tmp_path / "out", "--devices=2")
    for kill in (lambda pod: os.kill(rank_1(pod), signal.SIGKILL), lambda pod: pod.terminate()):
        before = {path: path.stat().st_mtime for path in tmp_path.rglob("last.ckpt")}
        with running(command, tmp_path / "log") as pod:
            wait_until(lambda old=before: {p: p.stat().st_mtime for p in tmp_path.rglob("last.ckpt")} != old, pod)
            kill(pod)
            assert pod.wait(100) not in (0, 2)  # soon: the other rank does not wait for ever
    succeed(command, tmp_path / "log")
    assert len([*(tmp_path / "out").iterdir()]) == 1  # all went on in the folder of the first
    runs.assert_same_weights(tmp_path / "out", alone)


def test_a_wrong_flag_fails_the_job_at_once(shards, tmp_path):
    with running(job_command(shards, tmp_path / "out", "--bogus"), tmp_path / "log") as pod:
        rule = {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [pod.wait(100)]}}
    assert rule in render()[1]["spec"]["podFailurePolicy"]["rules"]


# ---------------------------------------------------------------- several nodes


@pytest.fixture(scope="session")
def train_job() -> dict:
    """The TrainJob in README.md."""
    blocks = re.findall(r"^```yaml\n(.*?)^```", (TOP / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    [job] = [document for document in map(yaml.safe_load, blocks) if document.get("kind") == "TrainJob"]
    return job


@pytest.mark.quick
def test_train_job_has_the_fields_of_kubeflow_and_of_its_runtime(train_job):
    assert TrainJob.from_dict(train_job).to_dict() == train_job  # the models drop unknown fields
    assert train_job["spec"]["runtimeRef"]["name"] == "torch-distributed"
    [patch] = train_job["spec"]["runtimePatches"]
    [node] = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert node["name"] == container["name"] == "node"
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


# $1: host name, $2: /etc/hosts. The command is process 1, as in a pod.
POD = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'


def train_on_two_hosts(folder: Path, command: list[str], envs: list[dict[str, str]], alone: Path) -> None:
    """Run a command in a pod on each host; the run must end with the weights of the run `alone`."""
    new = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-c", POD, "-"]
    names = ["imagenet-node-0-0", "imagenet-node-0-1"]
    with places.two_hosts() as hosts, contextlib.ExitStack() as pods:
        lines = [f"{host.address} {name}.imagenet {name}\n" for host, name in zip(hosts, names)]
        (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(lines))
        commands = [[*host.command, *new, name, f"{folder}/hosts", *command] for host, name in zip(hosts, names)]
        both = [running(pod, folder / name, **env) for pod, name, env in zip(commands, names, envs)]
        for process, name in zip([pods.enter_context(pod) for pod in both], names):
            assert process.wait(600) == 0, (folder / name).read_text()[-3000:]
    runs.assert_same_weights(folder / "out", alone)


@pytest.mark.long
def test_train_job_on_two_hosts_trains_as_two_ranks_of_one(shards, alone, train_job, tmp_path):
    """With the variables that the runtime torch-distributed sets."""
    trainer = train_job["spec"]["trainer"]
    words = [word for word in trainer["command"] + trainer["args"] if not word.startswith(("--shards=", "--workers="))]
    here = {"torchrun": f"{Path(sys.executable).parent}/torchrun", "--nproc-per-node=gpu": "--nproc-per-node=1",
            "/app/imagenet_train.py": f"{TOP}/imagenet_train.py", "--output=/output": f"--output={tmp_path}/out"}
    assert set(here) <= set(words)
    command = [here.get(word, word) for word in words] + [f"--shards={shards}", *TWO_EPOCHS]
    env = {"PET_NNODES": str(trainer["numNodes"]), "PET_NPROC_PER_NODE": "auto",
           "PET_MASTER_ADDR": "imagenet-node-0-0.imagenet", "PET_MASTER_PORT": "29500"}
    train_on_two_hosts(tmp_path, command, [env | {"PET_NODE_RANK": str(rank)} for rank in (0, 1)], alone)


@pytest.mark.long
def test_slurm_tasks_on_two_nodes_train_as_two_ranks_of_one(shards, alone, tmp_path):
    """With the variables that srun sets for a task on each of two nodes."""
    command = [sys.executable, f"{TOP}/imagenet_train.py", f"--shards={shards}", f"--output={tmp_path}/out",
               "--num-nodes=2", "--devices=1", *TWO_EPOCHS]
    env = {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NNODES": "2",
           "SLURM_NTASKS_PER_NODE": "1", "SLURM_NODELIST": "imagenet-node-0-[0-1]", "SLURM_LOCALID": "0"}
    envs = [env | {"SLURM_PROCID": rank, "SLURM_NODEID": rank} for rank in ("0", "1")]
    train_on_two_hosts(tmp_path, command, envs, alone)
