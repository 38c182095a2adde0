"""Many machines for real: train.yml's pods and Slurm's tasks, each with its own network, host name and processes.

Where namespaces may not be made, all of them share this machine's loopback.
"""

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
from places import Host, free_port, two_hosts
from test_files import command_line, environment, render
from test_train import BATCH, HERE, SMALL, diary

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
POD = """
set -e
hostname "$1"; mount -t proc proc /proc; mount --bind "$2" /etc/hosts
for folder in /tmp "$3"; do mount --bind "$folder" "$folder"; done
mount -o remount,bind,ro /; ! touch /file 2>/dev/null
shift 3
exec setpriv --no-new-privs --bounding-set=-all --inh-caps=-all "$@"
"""
NAMESPACES = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child"]


def tree(pid: int) -> list[int]:
    """A process and all that came of it."""
    with contextlib.suppress(FileNotFoundError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [pid, *itertools.chain(*(tree(int(child)) for child in children))]
    return []


class Machines:
    """Two, with the host names imagenet-0 and imagenet-1. What is said on them goes to folder/log-N."""

    def __init__(self, hosts: tuple[Host, Host], folder: Path) -> None:
        self.hosts, self.folder = hosts, folder
        self.apart = bool(hosts[0].command)
        self.port = free_port()  # of the rendezvous, where they are not apart
        self.running: dict[int, subprocess.Popen] = {}
        (folder / "plain.py").write_text(PLAIN)
        domain = "imagenet.default.svc.cluster.local"
        names = [f"{h.address} imagenet-{i}.{domain} imagenet-{i}.imagenet imagenet-{i}\n" for i, h in enumerate(hosts)]
        (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(names))

    def start(self, index: int, command: list[str], **env: str) -> None:
        if self.apart:
            pod = ["bash", "-c", POD, "-", f"imagenet-{index}", self.folder / "hosts", self.folder]
            command = [*self.hosts[index].command, *NAMESPACES, *pod, *command]
        env = {"OMP_NUM_THREADS": "1", "RECORD": str(self.folder), "WORKERS": "1", "HOME": "/tmp"} | env
        env["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        with open(self.folder / f"log-{index}", "ab") as log:
            self.running[index] = subprocess.Popen(
                command, env=os.environ | env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def send(self, index: int, number: signal.Signals) -> None:
        """To the first process of a container; SIGKILL to all of them."""
        processes = tree(self.running[index].pid)
        for pid in processes if number == signal.SIGKILL else processes[self.apart : self.apart + 1]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def words(self, index: int) -> str:
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


def start_pod(machines: Machines, shards: Path, index: int) -> None:
    """The containers of one pod of train.yml, one after the other, for two nodes."""
    job = render(shards=str(shards), nodes=2)[2]
    here = {
        "/app/imagenet_train.py": str(machines.folder / "plain.py"),
        "--nproc-per-node=gpu": "--nproc-per-node=1",
        "--output=/output": f"--output={machines.folder}/out",
    }
    if not machines.apart:
        here["--rdzv-endpoint=imagenet-0.imagenet:29400"] = f"--rdzv-endpoint=127.0.0.1:{machines.port}"
    words = command_line(job, index)
    assert set(here) <= set(words)
    train = [here.get(word, word) for word in words] + RECIPE
    init = job["spec"]["template"]["spec"]["initContainers"][0]["command"] if machines.apart else ["true"]
    both = ["bash", "-c", 'n=$1; shift; "${@:1:n}" && exec "${@:n+1}"', "-", str(len(init)), *init, *train]
    machines.start(index, both, **environment(job, index))


class Together(script.Loader):
    """One process's batches, each made of those that two ranks would get."""

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        ranks = [script.Loader(replace(self.config, batch=BATCH, rank=rank, world=2)) for rank in (0, 1)]
        for rank in ranks:
            rank.epoch = self.epoch
        for pair in zip(*ranks):
            self.epoch, self.done = ranks[0].epoch, ranks[0].done
            yield [torch.cat(part) for part in zip(*pair)]


def train_together(data: script.ImageNetData) -> Together:
    data.loader = Together(data.train)
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
    one, two = (torch.load(script.newest_checkpoint(f / "out"), weights_only=True)["state_dict"] for f in (alone, folder))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, msg=lambda text, name=name: f"{name}: {text}")


def run_job(machines: Machines, shards: Path, blows: list[tuple[int, signal.Signals, str]]) -> None:
    """What Kubernetes does: it starts the pods, and replaces one that failed, until all have succeeded.

    blows: pod, signal, and the beginning of the line in its diary that brings it about.
    """
    for index in (0, 1):
        start_pod(machines, shards, index)
    deadline = time.monotonic() + 400
    while any(process.poll() != 0 for process in machines.running.values()):
        for index, process in list(machines.running.items()):
            if process.poll():
                start_pod(machines, shards, index)
        for index, number, moment in blows[:1]:
            path = machines.folder / f"rank-{index}.jsonl"
            if path.exists() and moment in path.read_text():
                machines.send(index, number)
                del blows[0]
        assert time.monotonic() < deadline, machines.words(0)[-2000:] + machines.words(1)[-2000:]
        time.sleep(0.02)
    assert not blows


def test_pods_come_back_and_train_as_one_process(unique, alone, machines):
    """One is told to go within an epoch, and saves; the first, which hosts the rendezvous, is killed in the next."""
    run_job(machines, unique, [(1, signal.SIGTERM, "[0, 2, "), (0, signal.SIGKILL, "[1, 7, ")])
    assert all("SIGTERM: " in machines.words(index) for index in (0, 1))
    for rank in (0, 1):
        assert len(diary(machines.folder, rank, "train", epoch=0)) == STEPS  # each once: saved, not made again
    check(machines.folder, alone)
    assert results(machines.words(0)) == results((alone / "log").read_text())


def test_slurm_tasks_on_two_nodes(unique, alone, machines):
    """What srun sets for a task on each of two nodes."""
    port = free_port()
    while not 15000 <= port < 25000:
        port = free_port()
    common = {
        "SLURM_JOB_ID": str(port - 15000), "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NNODES": "2",
        "SLURM_NTASKS_PER_NODE": "1", "SLURM_NODELIST": "imagenet-[0-1]" if machines.apart else "127.0.0.1",
        "SLURM_LOCALID": "0",
    }
    flags = [f"--shards={unique}", f"--output={machines.folder}/out", "--num-nodes=2", "--devices=1", *RECIPE]
    for index in (0, 1):
        task = common | {"SLURM_PROCID": str(index), "SLURM_NODEID": str(index)}
        machines.start(index, [sys.executable, str(machines.folder / "plain.py"), *flags], **task)
    assert [machines.running[index].wait(300) for index in (0, 1)] == [0, 0], machines.words(0) + machines.words(1)
    assert len(diary(machines.folder, 0, "train")) == len(diary(machines.folder, 1, "train")) == EPOCHS * STEPS
    check(machines.folder, alone)
    assert results(machines.words(0)) == results((alone / "log").read_text())
