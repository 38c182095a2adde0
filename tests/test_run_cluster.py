"""Many machines for real: train.yml's pods and Slurm's tasks, each with its own network, host name and processes."""

import contextlib
import itertools
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TRAIN_IMAGES, VAL_IMAGES, forked
from manifest import command_line, environment, render
from places import Host, free_port, two_hosts
from training import BATCH, HERE, SMALL, diary

import imagenet_train as script

STEPS = TRAIN_IMAGES // (2 * BATCH)
EPOCHS = 3
# Without batch norm, which would see other batches on two ranks than on one; and without dropout, see PLAIN.
RECIPE = [*SMALL, "--model=squeezenet1_1", "--lr=2", f"--max-epochs={EPOCHS}"]
PLAIN = f"""
import runpy, sys, torch
torch.nn.Dropout.forward = lambda module, images: images
sys.path.insert(0, {str(HERE)!r})
runpy.run_path({str(HERE / "record.py")!r}, run_name="__main__")
"""
# What a container runtime does: the host's name and its view of DNS, a read-only root but for volumes, no privileges.
# $1: host name, $2: /etc/hosts, $3: a volume, $4: "shared" if process 1 is not the command but reaps orphans.
POD = """
set -e
hostname "$1"; mount -t proc proc /proc; mount --bind "$2" /etc/hosts
for folder in /tmp "$3"; do mount --bind "$folder" "$folder"; done
mount -o remount,bind,ro /; ! touch /file 2>/dev/null
shared=$4; shift 4
set -- setpriv --no-new-privs --bounding-set=-all --inh-caps=-all "$@"
[ "$shared" ] || exec "$@"
"$@" & wait $!
"""
NAMESPACES = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child"]


def tree(pid: int) -> list[int]:
    """A process and all that came of it."""
    with contextlib.suppress(FileNotFoundError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [pid, *itertools.chain(*(tree(int(child)) for child in children))]
    return []


class Machines:
    """Two, with the host names imagenet-0 and imagenet-1. Their output goes to folder/log-N."""

    def __init__(self, hosts: tuple[Host, Host], folder: Path) -> None:
        self.hosts, self.folder = hosts, folder
        self.running: dict[int, subprocess.Popen] = {}
        self.depth: dict[int, int] = {}  # of the command: 1 if it is process 1 of its machine, else 2
        (folder / "bin").mkdir()
        (folder / "plain.py").write_text(PLAIN)
        domain = "imagenet.default.svc.cluster.local"
        names = [f"{h.address} imagenet-{i}.{domain} imagenet-{i}.imagenet imagenet-{i}\n" for i, h in enumerate(hosts)]
        (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(names))

    def start(self, index: int, command: list[str], shared: bool = False, **env: str) -> None:
        """Run a command on one of them. shared: its process 1 is not the command, as with shareProcessNamespace."""
        home = self.folder / f"home-{index}"
        home.mkdir(exist_ok=True)
        self.depth[index] = 1 + shared
        pod = ["bash", "-c", POD, "-", f"imagenet-{index}", self.folder / "hosts", self.folder, "shared" * shared]
        env = {"OMP_NUM_THREADS": "1", "RECORD": str(self.folder), "WORKERS": "1", "HOME": str(home)} | env
        env["PATH"] = f"{self.folder}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
        with open(self.folder / f"log-{index}", "ab") as log:
            self.running[index] = subprocess.Popen(
                [*self.hosts[index].command, *NAMESPACES, *pod, *command], env=os.environ | env,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )

    def replace(self, name: str, script: str) -> None:
        """Let a command on both of them be this Python script."""
        (self.folder / "bin" / name).write_text(f"#!{sys.executable}\n{script}")
        (self.folder / "bin" / name).chmod(0o755)

    def send(self, index: int, number: signal.Signals) -> None:
        """To the command of a container; SIGKILL to all processes."""
        processes, depth = tree(self.running[index].pid), self.depth[index]
        for pid in processes if number == signal.SIGKILL else processes[depth : depth + 1]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def output(self, index: int) -> str:
        return (self.folder / f"log-{index}").read_text()

    def stop(self) -> None:
        for index, process in self.running.items():
            self.send(index, signal.SIGKILL)
            process.wait()


@pytest.fixture
def machines(tmp_path) -> Iterator[Machines]:
    with two_hosts() as hosts:
        pair = Machines(hosts, tmp_path)
        try:
            yield pair
        finally:
            pair.stop()


def start_pod(machines: Machines, job: dict, index: int) -> None:
    """The container of one pod of train.yml."""
    here = {
        "/app/imagenet_train.py": str(machines.folder / "plain.py"),
        "--nproc-per-node=gpu": "--nproc-per-node=1",
        "--output=/output": f"--output={machines.folder}/out",
    }
    words = command_line(job, index)
    assert set(here) <= set(words)
    shared = job["spec"]["template"]["spec"].get("shareProcessNamespace", False)
    machines.start(index, [here.get(word, word) for word in words] + RECIPE, shared, **environment(job, index))


class Together(script.Loader):
    """One process's batches, each made of those that two ranks would get."""

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        ranks = [script.Loader(replace(self.config, batch=BATCH, rank=rank, world=2)) for rank in (0, 1)]
        for rank in ranks:
            rank.epoch = self.epoch
        for pair in zip(*ranks):
            self.advance()
            yield [torch.cat(part) for part in zip(*pair)]


def train_together(data: script.ImageNetData) -> Together:
    if data.loader is None:
        data.loader = Together(data.train, lightning_epoch=lambda: data.trainer.current_epoch)
    return data.loader


def run_alone(shards: Path, folder: Path) -> None:
    forked()
    with open(folder / "log", "w", buffering=1) as sys.stdout:
        sys.stderr = sys.stdout
        script.ImageNetData.train_dataloader = train_together
        torch.nn.Dropout.forward = lambda module, images: images
        size = f"--batch-size={2 * BATCH}"
        os._exit(script.main([f"--shards={shards}", f"--output={folder}/out", "--workers=1", *RECIPE, size]))


def results(log: str) -> list[str]:
    """What was printed at the end of each epoch; once, if that came again after a kill."""
    return list(dict.fromkeys(re.findall(r"validated \d.*\)", log)))


@pytest.fixture(scope="module")
def alone(unique, tmp_path_factory) -> Path:
    """The folder in which one process has trained with twice the batch."""
    folder = tmp_path_factory.mktemp("alone")
    process = multiprocessing.get_context("fork").Process(target=run_alone, args=(unique, folder))
    process.start()
    process.join()
    assert process.exitcode == 0, (folder / "log").read_text()
    assert len(results((folder / "log").read_text())) == EPOCHS
    return folder


def check(folder: Path, alone: Path) -> None:
    """What two ranks did: each sample once an epoch, again only in a step made again; the weights of one process."""
    for epoch in range(EPOCHS):
        trained, seen = {}, {}
        for rank in (0, 1):
            for line in (folder / f"rank-{rank}.jsonl").read_text().splitlines():
                if line.endswith("]") and json.loads(line)[0] == epoch:  # a kill may cut the last one
                    _, step, kind, labels = json.loads(line)
                    place = (rank, step) if kind == "train" else (rank, tuple(labels))
                    assert (trained if kind == "train" else seen).setdefault(place, labels) == labels
        labels = list(itertools.chain(*trained.values()))
        assert len(trained) == 2 * STEPS and len(labels) == len(set(labels)) == 2 * STEPS * BATCH
        labels = [label for batch in seen.values() for label in batch if label != script.IGNORE_INDEX]
        assert sorted(labels) == list(range(VAL_IMAGES))
    newest = [script.newest_checkpoint(f / "out") for f in (alone, folder)]
    one, two = (torch.load(path, weights_only=True)["state_dict"] for path in newest)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, msg=lambda text, name=name: f"{name}: {text}")


def run_job(machines: Machines, job: dict, signals: list[tuple[int, signal.Signals, str]]) -> str:
    """What Kubernetes does: it starts the pods and replaces one that failed, until the Job is Complete or Failed.

    signals: pod, signal, and the beginning of the line in its diary after which it is sent.
    """
    spec = job["spec"]
    exits = [rule["onExitCodes"]["values"] for rule in spec["podFailurePolicy"]["rules"] if rule["action"] == "FailJob"]
    assert {"succeededCount": 1} in spec["successPolicy"]["rules"]
    for index in range(spec["completions"]):
        start_pod(machines, job, index)
    deadline = time.monotonic() + 400
    while True:
        for index, process in list(machines.running.items()):
            status = process.poll()
            if status == 0:
                return "Complete"
            if status in itertools.chain(*exits):
                return "Failed"
            if status:
                start_pod(machines, job, index)
        for index, number, moment in signals[:1]:
            path = machines.folder / f"rank-{index}.jsonl"
            if path.exists() and moment in path.read_text():
                machines.send(index, number)
                del signals[0]
        assert time.monotonic() < deadline, machines.output(0)[-2000:] + machines.output(1)[-2000:]
        time.sleep(0.02)


@pytest.mark.long
def test_pods_come_back_and_train_as_one_process(unique, alone, machines):
    """One is told to go within an epoch, and saves; the first, which hosts the rendezvous, is killed in the next."""
    signals = [(1, signal.SIGTERM, "[0, 2, "), (0, signal.SIGKILL, "[1, 7, ")]
    assert run_job(machines, render(shards=str(unique), nodes=2)[2], signals) == "Complete" and not signals
    assert all("SIGTERM: " in machines.output(index) for index in (0, 1))
    for rank in (0, 1):
        assert len(diary(machines.folder, rank, "train", epoch=0)) == STEPS  # each once: saved, not made again
    check(machines.folder, alone)
    assert results(machines.output(0)) == results((alone / "log").read_text())


def test_more_pods_than_torchrun_is_told_of_fail_the_job(machines):
    machines.replace("torchrun", "import time; time.sleep(1000)")
    assert run_job(machines, render(nodes=2, last=0)[2], []) == "Failed"
    assert machines.output(1) == "train.yml: succeededIndexes: 0 is too small; set it to parallelism - 1\n"
    assert machines.running[0].poll() is None


ORPHAN = """
import glob, subprocess, time
subprocess.run(["sh", "-c", "sleep 0.1 & :"])
time.sleep(0.5)
print(*[line for path in glob.glob("/proc/[0-9]*/stat") if " Z " in (line := open(path).read())], end="")
"""


def test_orphans_of_a_pod_are_reaped(machines):
    """Such as the rest of a pipe: command that was ended. torchrun does not reap what it did not start."""
    machines.replace("torchrun", ORPHAN)
    assert run_job(machines, render()[2], []) == "Complete"
    assert machines.output(0) == ""


# What Google Cloud tells a pod about its service account. A line of output for each request.
METADATA = """
import http.server

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        print(self.path, flush=True)
        token = '{"access_token": "x", "expires_in": 3600}'
        scope = "https://www.googleapis.com/auth/devstorage.read_only"
        answers = {"token": token, "scopes": scope, "service-accounts": "default/"}
        self.send_response(200)
        self.send_header("Metadata-Flavor", "Google")
        self.end_headers()
        self.wfile.write(answers.get(self.path.split("/")[-1], "").encode())

    def log_message(self, *args):
        pass

server = http.server.HTTPServer(("", 80), Handler)
print("ready", flush=True)
server.serve_forever()
"""
# A bucket beside gsutil in the pod; ~/.boto is that of the pod, the other has the bucket's address.
GSUTIL = f"""
import os, pathlib, subprocess, sys
sys.path.insert(0, {str(HERE)!r})
import places
with places.gcs(pathlib.Path(os.environ["RECORD"])) as env:
    env["BOTO_PATH"] = env.pop("BOTO_CONFIG") + ":" + os.path.expanduser("~/.boto")
    sys.exit(subprocess.run(["gsutil", "cat", "gs://bucket/name"], env=os.environ | env).returncode)
"""


@pytest.mark.parametrize("cloud", ["google", "other"])
def test_gsutil_in_a_pod_logs_in_as_its_service_account_where_there_is_one(machines, cloud):
    (machines.folder / "bucket").mkdir()
    (machines.folder / "bucket" / "name").write_text("the object")
    machines.replace("torchrun", GSUTIL)
    command = [*machines.hosts[1].command, sys.executable, "-c", METADATA]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout.readline() == "ready\n"
            if cloud == "google":
                with open(machines.folder / "hosts", "a") as hosts:
                    hosts.write(f"{machines.hosts[1].address} metadata.google.internal\n")
            assert run_job(machines, render()[2], []) == "Complete", machines.output(0)
        finally:
            server.terminate()
        requests = server.stdout.read()
    assert machines.output(0) == "the object"
    assert ("/service-accounts/default/token" in requests) == (cloud == "google")


def test_hosts_that_cannot_be_made_skip_a_test_but_fail_it_in_ci(monkeypatch, tmp_path):
    (tmp_path / "ip").write_text("#!/bin/sh\necho Operation not permitted >&2\nexit 1\n")
    (tmp_path / "ip").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="Operation not permitted"), two_hosts():
        pass
    monkeypatch.setenv("CI", "true")
    with pytest.raises(RuntimeError, match="Operation not permitted"), two_hosts():
        pass


@pytest.mark.long
def test_slurm_tasks_on_two_nodes(unique, alone, machines):
    """What srun sets for a task on each of two nodes."""
    port = free_port()
    while not 15000 <= port < 25000:
        port = free_port()
    common = {
        "SLURM_JOB_ID": str(port - 15000), "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NNODES": "2",
        "SLURM_NTASKS_PER_NODE": "1", "SLURM_NODELIST": "imagenet-[0-1]", "SLURM_LOCALID": "0",
    }
    flags = [f"--shards={unique}", f"--output={machines.folder}/out", "--num-nodes=2", "--devices=1", *RECIPE]
    for index in (0, 1):
        task = common | {"SLURM_PROCID": str(index), "SLURM_NODEID": str(index)}
        machines.start(index, [sys.executable, str(machines.folder / "plain.py"), *flags], **task)
    assert [machines.running[index].wait(300) for index in (0, 1)] == [0, 0], machines.output(0) + machines.output(1)
    assert len(diary(machines.folder, 0, "train")) == len(diary(machines.folder, 1, "train")) == EPOCHS * STEPS
    check(machines.folder, alone)
    assert results(machines.output(0)) == results((alone / "log").read_text())
