"""Checkpoints: whatever happens during a save, the previous one or the new one is there, complete, to resume from."""

import os
import random
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from faults import small_disk
from ranks import assert_same_weights, checkpoint, exit_codes, log, run, start, steps
from training import SMALL, TINY

import imagenet_train as script


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Iterator[Path]:
    """TMPDIR on another file system than the checkpoints."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("/dev/shm is no file system of its own")
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", None)  # where Python remembers TMPDIR
        yield Path(folder)


def train(shards: Path, folder: Path, *flags: str) -> int:
    return script.main([f"--shards={shards}", f"--output={folder}", "--workers=0", "--max-epochs=1", *TINY, *flags])


def test_a_save_does_not_touch_the_previous_checkpoint(unique, tmp_path, elsewhere):
    """A link to the previous file keeps its bytes: what is written is another file, which gets the name afterwards."""
    for resume, steps_before in (([], 0), (["--resume"], 2)):
        assert train(unique, tmp_path, f"--max-steps={2 + steps_before}", *resume) == 0
        if not resume:
            os.link(tmp_path / "version_0" / "last.ckpt", tmp_path / "link")
            first = (tmp_path / "link").read_bytes()
    assert (tmp_path / "link").read_bytes() == first
    assert checkpoint(tmp_path)["global_step"] == 4


def test_the_data_is_on_disk_before_the_name(unique, tmp_path, monkeypatch):
    """For both checkpoints: the file's data, then its name, then the folder that holds the name."""
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(f"{a} -> {b}"), replace(a, b)))
    assert train(unique, tmp_path) == 0
    folder = f"{tmp_path}/version_0"
    for name in ("last.ckpt", "best.ckpt"):
        rename = f"{folder}/checkpoint.tmp -> {folder}/{name}"
        at = calls.index(rename)
        assert calls[at - 1 : at + 2] == [f"{folder}/checkpoint.tmp", rename, folder]


def test_a_full_disk_keeps_the_previous_checkpoint(unique, tmp_path, capsys):
    """The disk has space for one checkpoint and a half."""
    disk = tmp_path / "disk"
    small_disk(disk, "size=4700k")
    try:
        assert train(unique, disk, SMALL[0], "--max-steps=2") == 0
        last = disk / "version_0" / "last.ckpt"
        previous = last.read_bytes()
        capsys.readouterr()
        assert train(unique, disk, SMALL[0], "--max-steps=4", "--resume") == 1
        error = f"{last}: can't save the checkpoint: No space left on device; the previous one is kept"
        assert capsys.readouterr().err == f"imagenet_train.py: {error}\n"
        assert last.read_bytes() == previous and not list(disk.rglob("*.tmp"))
        assert os.system(f"mount -o remount,size=20m '{disk}'") == 0
        assert train(unique, disk, SMALL[0], "--max-steps=4", "--resume") == 0
        assert checkpoint(disk)["global_step"] == 4
    finally:
        os.system(f"umount '{disk}'")


def test_no_space_for_the_first_checkpoint(unique, tmp_path, capsys):
    disk = tmp_path / "disk"
    small_disk(disk, "size=1m")
    try:
        assert train(unique, disk, SMALL[0], "--max-steps=2") == 1
        assert "No space left on device; there is no previous one\n" in capsys.readouterr().err
        assert not list(disk.rglob("*.ckpt")) and not list(disk.rglob("*.tmp"))
    finally:
        os.system(f"umount '{disk}'")


def test_the_file_of_a_killed_save_is_replaced(unique, tmp_path):
    assert train(unique, tmp_path, "--max-steps=1") == 0
    (tmp_path / "version_0" / "checkpoint.tmp").write_bytes(b"half a checkpoint")
    assert train(unique, tmp_path, "--max-steps=2", "--resume") == 0
    assert not list(tmp_path.rglob("*.tmp")) and checkpoint(tmp_path)["global_step"] == 2


def test_the_best_score_survives_a_resume(unique, tmp_path):
    """last.ckpt knows the accuracy of the epoch that it ends: a worse one later does not replace best.ckpt."""
    assert train(unique, tmp_path) == 0
    last, best = checkpoint(tmp_path), checkpoint(tmp_path, "best.ckpt")
    (state,) = (value for key, value in last["callbacks"].items() if key.startswith("ModelCheckpoint"))
    assert state["best_model_path"] == str(tmp_path / "version_0" / "best.ckpt")
    assert state["best_model_score"] is not None
    assert last["global_step"] == best["global_step"] == 11


def test_two_ranks_killed_at_random_moments(unique, tmp_path, elsewhere):
    """SIGKILL of either rank or of both, a checkpoint after each step; the weights are those of an undisturbed run."""
    flags = [f"--shards={unique}", "--max-epochs=4", "--checkpoint-every=1", "--resume"]
    run(tmp_path / "undisturbed", *flags, ranks=2)
    folder, rng, kills = tmp_path / "killed", random.Random(), 0
    diary = folder / "rank-0.jsonl"
    victims = [[0], [1], [0, 1]] * (int(os.environ.get("KILLS", 3)) // 3 + 1)
    for victim in victims[: int(os.environ.get("KILLS", 3))]:
        size = diary.stat().st_size if diary.exists() else 0
        processes = start(folder, *flags, ranks=2)
        while processes[0].is_alive() and (not diary.exists() or diary.stat().st_size == size):
            time.sleep(0.01)  # until it makes steps
        time.sleep(rng.uniform(0, 0.1))
        for rank in victim:
            processes[rank].kill()
            processes[rank].join()
            kills += processes[rank].exitcode == -signal.SIGKILL
        for process in processes:  # what torchrun does with the others
            process.join(1)
            process.kill()
        exit_codes(processes)
        for path in folder.rglob("*.ckpt"):
            torch.load(path, weights_only=True)
    assert kills >= 2, log(folder)
    run(folder, *flags, ranks=2)
    for rank in range(2):
        assert steps(folder, rank) == steps(tmp_path / "undisturbed", rank)
    assert_same_weights(folder, tmp_path / "undisturbed")
