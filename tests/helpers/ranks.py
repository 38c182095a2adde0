"""Runs imagenet_train.py in forked processes, one for each rank, which saves the seconds of importing PyTorch."""

import json
import multiprocessing
import os
import re
import socket
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from conftest import forked
from training import TINY

import imagenet_train as script


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_rank(folder: Path, flags: list[str], env: dict[str, str]) -> None:
    """In a forked process: the script with a diary; see record.py. Its output is appended to folder/log-RANK."""
    forked()
    os.environ |= {"RECORD": str(folder)} | env
    with open(folder / f"log-{env.get('RANK', 0)}", "a", buffering=1) as sys.stdout:
        sys.stderr = sys.stdout
        import record

        record.folder = folder
        os._exit(script.main([*TINY, "--workers=1", f"--output={folder}/out", *flags]))


def start(folder: Path, *flags: str, ranks: int = 1, **env: str) -> list[BaseProcess]:
    folder.mkdir(exist_ok=True)
    if ranks > 1:
        flags = (*flags, f"--devices={ranks}")
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
        env |= {"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}  # as torchrun does
    fork = multiprocessing.get_context("fork")
    processes = []
    for rank in range(ranks):
        own = env | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else env
        processes.append(fork.Process(target=run_rank, args=(folder, list(flags), own)))
        processes[-1].start()
    return processes


def exit_codes(processes: list[BaseProcess]) -> list[int]:
    for process in processes:
        process.join(200)
    return [process.exitcode for process in processes]


def run(folder: Path, *flags: str, ranks: int = 1, expect: int = 0, **env: str) -> str:
    """Run to the end; the exit status of every rank must be `expect`. Returns what rank 0 printed."""
    codes = exit_codes(start(folder, *flags, ranks=ranks, **env))
    assert codes == [expect] * ranks, log(folder)
    return log(folder, 0)


def log(folder: Path, *ranks: int) -> str:
    """What these ranks printed; without numbers, all of them."""
    paths = [folder / f"log-{rank}" for rank in ranks] if ranks else sorted(folder.glob("log-*"))
    return "".join(path.read_text() for path in paths if path.exists())


def wait_for(path: Path, pattern: str) -> None:
    for _ in range(6000):
        if path.exists() and re.search(pattern, path.read_text()):
            return
        time.sleep(0.02)
    pytest.fail(f"{pattern!r} never came in {path}")


def checkpoint(folder: Path, name: str = "last.ckpt") -> dict:
    """The one of this name below the folder."""
    (path,) = folder.rglob(name)
    return torch.load(path, weights_only=True)


def assert_same_weights(a: Path, b: Path) -> None:
    ours, theirs = (checkpoint(folder)["state_dict"] for folder in (a, b))
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == [] and ours.keys() == theirs.keys()


def steps(folder: Path, rank: int = 0) -> dict[int, list[int]]:
    """Step → labels of its batch. A step that was repeated after a kill must have got the same batch."""
    made: dict[int, list[int]] = {}
    for line in (folder / f"rank-{rank}.jsonl").read_text().splitlines():
        if line.endswith("]"):  # a kill may cut the last one
            _, step, kind, labels = json.loads(line)
            assert kind != "train" or made.setdefault(step, labels) == labels
    return made
