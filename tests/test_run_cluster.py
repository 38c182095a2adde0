"""train.yml and the README's TrainJob: checked against the API's schemas, and their commands run as pods run them."""

import contextlib
import http.server
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import kubernetes_validate
import places
import pytest
import torch
import yaml
from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob as TrainJob
from pods import SMALL, TOP, pod_of, render, wait_until

TWO_EPOCHS = [*SMALL, "--max-epochs=2"]



# ---------------------------------------------------------------- train.yml


@pytest.mark.quick
def test_documents_are_valid_for_kubernetes():
    documents = render()
    assert [document["kind"] for document in documents] == ["PersistentVolumeClaim", "Job", "ConfigMap"]
    for document in documents:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize(
    "shards",
    ["pipe:gsutil cat gs://bucket/%s", "http://host/a b/", """pipe:sh -c 'cat "/data/%s" # {x}: [y] & *z \\n'"""],
)
def test_image_and_shards_are_passed_unchanged_and_nothing_else_is_replaced(shards):
    names = subprocess.run(["envsubst", "--variables", (TOP / "train.yml").read_text()], capture_output=True, text=True)
    assert set(names.stdout.split()) == {"image", "shards"}
    _, container = pod_of(render("registry/x:1@sha256:00", shards)[1])
    assert f"--shards={shards}" in container["args"] and container["image"] == "registry/x:1@sha256:00"


def test_volumes_claims_and_config_maps_exist():
    """The schemas do not see a name without its object, nor a name that DNS does not allow."""
    claim, job, config = render()
    pod, container = pod_of(job)
    volumes = {volume.pop("name"): volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert set(mounts.values()) == set(volumes) and {"/output", "/dev/shm", "/tmp"} < set(mounts)
    assert volumes[mounts["/output"]]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    [boto] = [variable["value"] for variable in container["env"] if variable["name"] == "BOTO_CONFIG"]
    folder, key = boto.rsplit("/", 1)
    assert volumes[mounts[folder]]["configMap"] == {"name": config["metadata"]["name"], "optional": True}
    assert key in config["data"]
    for name in [d["metadata"]["name"] for d in (claim, job, config)] + [container["name"], *volumes]:
        assert re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", name)


def test_shared_memory_holds_the_batches_of_all_loader_processes():
    """Two batches for training and two for validation, of 256 images of 224 x 224 x 3 bytes, for each process."""
    batches = 4 * 256 * 224 * 224 * 3
    pod, container = pod_of(render()[1])
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
    pod, container = pod_of(render()[1])
    context = pod["securityContext"]
    assert context["runAsNonRoot"] and context["runAsUser"] and context["seccompProfile"]["type"] == "RuntimeDefault"
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys() and pod["automountServiceAccountToken"] is False
    kinds = {kind for volume in pod["volumes"] for kind in volume.keys() - {"name"}}
    assert kinds <= {"configMap", "emptyDir", "persistentVolumeClaim"}
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


class Metadata(http.server.BaseHTTPRequestHandler):
    """What Google Cloud tells a pod about its service account."""

    requests: list[str] = []
    scope = "https://www.googleapis.com/auth/devstorage.read_only"
    answers = {"token": '{"access_token": "x", "expires_in": 3600}', "scopes": scope, "service-accounts": "default/"}

    def do_GET(self):
        self.requests.append(self.path)
        self.send_response(200)
        self.send_header("Metadata-Flavor", "Google")
        self.end_headers()
        self.wfile.write(self.answers.get(self.path.split("?")[0].split("/")[-1], "").encode())

    def log_message(self, *args):
        pass


def test_gsutil_logs_in_as_the_service_account_with_the_config_map(tmp_path):
    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket" / "name").write_text("the object")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with places.gcs(tmp_path) as env:
        (tmp_path / "boto").write_text(Path(env["BOTO_CONFIG"]).read_text() + render()[2]["data"]["boto"])
        env |= {"BOTO_CONFIG": f"{tmp_path}/boto", "GCE_METADATA_ROOT": f"127.0.0.1:{server.server_port}"}
        assert places.call(env, "gsutil", "cat", "gs://bucket/name") == "the object"
    server.shutdown()
    server.server_close()
    assert any(path.endswith("/token") for path in Metadata.requests)


# ---------------------------------------------------------------- the Job's command


def job_command(job: dict, shards: Path, output: Path, *flags: str) -> list[str]:
    """What the container runs, on small images and on this machine's CPU."""
    script, *args = pod_of(job)[1]["args"]
    args = [word for word in args if not word.startswith(("--shards=", "--output=", "--workers="))]
    return [sys.executable, f"{TOP}/{script}", f"--shards={shards}", f"--output={output}", *args, *TWO_EPOCHS, *flags]


@contextlib.contextmanager
def running(command: list[str], log: Path, **env: str) -> Iterator[subprocess.Popen]:
    """A container: when its command has ended, the engine kills what is left of its processes."""
    streams = {"stdin": subprocess.DEVNULL, "stdout": open(log, "ab"), "stderr": subprocess.STDOUT}
    env = os.environ | {"OMP_NUM_THREADS": "1"} | env
    with streams["stdout"], subprocess.Popen(command, env=env, start_new_session=True, **streams) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def succeed(process: subprocess.Popen, log: Path) -> None:
    assert process.wait(600) == 0, log.read_text()[-3000:]


def same_weights(one: Path, two: Path) -> None:
    newest = [max(folder.rglob("last.ckpt"), key=lambda path: path.stat().st_mtime) for folder in (one, two)]
    one, two = (torch.load(path, weights_only=True)["state_dict"] for path in newest)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture(scope="module")
def alone(shards, tmp_path_factory) -> Path:
    """The output of an undisturbed run on two ranks, with the Job's command."""
    folder = tmp_path_factory.mktemp("alone")
    with running(job_command(render()[1], shards, folder / "out", "--devices=2"), folder / "log") as process:
        succeed(process, folder / "log")
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
    command = job_command(render()[1], shards, tmp_path / "out", "--devices=2")
    for kill in (lambda pod: os.kill(rank_1(pod), signal.SIGKILL), lambda pod: pod.terminate()):
        before = {path: path.stat().st_mtime for path in tmp_path.rglob("last.ckpt")}
        with running(command, tmp_path / "log") as pod:
            wait_until(lambda old=before: {p: p.stat().st_mtime for p in tmp_path.rglob("last.ckpt")} != old, pod)
            kill(pod)
            assert pod.wait(100) not in (0, 2)  # soon: the other rank does not wait for ever
    with running(command, tmp_path / "log") as pod:
        succeed(pod, tmp_path / "log")
    assert len([*(tmp_path / "out").iterdir()]) == 1  # all went on in the folder of the first
    same_weights(tmp_path / "out", alone)


def test_a_wrong_flag_fails_the_job_at_once(shards, tmp_path):
    job = render()[1]
    with running(job_command(job, shards, tmp_path / "out", "--bogus"), tmp_path / "log") as pod:
        rule = {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [pod.wait(100)]}}
    assert rule in job["spec"]["podFailurePolicy"]["rules"]


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


def train_on_two_hosts(folder: Path, command: list[str], envs: list[dict[str, str]]) -> None:
    names = ["imagenet-node-0-0", "imagenet-node-0-1"]
    new = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-c", POD, "-"]
    with places.two_hosts() as hosts, contextlib.ExitStack() as pods:
        lines = [f"{host.address} {name}.imagenet {name}\n" for host, name in zip(hosts, names)]
        (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(lines))
        processes = []
        for host, name, env in zip(hosts, names, envs):
            pod = [*host.command, *new, name, str(folder / "hosts"), *command]
            processes.append(pods.enter_context(running(pod, folder / name, **env)))
        for process, name in zip(processes, names):
            succeed(process, folder / name)


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
    train_on_two_hosts(tmp_path, command, [env | {"PET_NODE_RANK": str(rank)} for rank in (0, 1)])
    same_weights(tmp_path / "out", alone)


@pytest.mark.long
def test_slurm_tasks_on_two_nodes_train_as_two_ranks_of_one(shards, alone, tmp_path):
    """With the variables that srun sets for a task on each of two nodes."""
    command = [sys.executable, f"{TOP}/imagenet_train.py", f"--shards={shards}", f"--output={tmp_path}/out",
               "--num-nodes=2", "--devices=1", *TWO_EPOCHS]
    env = {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NNODES": "2",
           "SLURM_NTASKS_PER_NODE": "1", "SLURM_NODELIST": "imagenet-node-0-[0-1]", "SLURM_LOCALID": "0"}
    envs = [env | {"SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank)} for rank in (0, 1)]
    train_on_two_hosts(tmp_path, command, envs)
    same_weights(tmp_path / "out", alone)
