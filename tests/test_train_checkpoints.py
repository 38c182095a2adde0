"""Checkpoints: whatever ends a run, at whatever moment, --resume continues with the same batches, on any settings."""

import itertools
import os
import random
import re
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import runs
import torch
from conftest import TRAIN_IMAGES, VAL_IMAGES, convert
from faults import small_disk
from runs import BATCH, assert_same_weights, checkpoint, diary, exit_codes, log, run, start, steps, train

import imagenet_train as script

STEPS = TRAIN_IMAGES // BATCH
KILLS = int(os.environ.get("KILLS", 4))  # at random moments, for each number of ranks
VALIDATED = rf"validated {VAL_IMAGES}/{VAL_IMAGES} images: .* \((epoch \d), step (\d+)\)"


# ---------------------------------------------------------------- atomic


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Iterator[None]:
    """TMPDIR on another file system than the checkpoints."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("/dev/shm is no file system of its own")
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", None)  # where Python remembers TMPDIR
        yield


def test_a_new_file_replaces_the_previous_one(unique, tmp_path, elsewhere, monkeypatch):
    """First the file's data is on disk, then it gets its name, then the folder is on disk.

    A link to the previous file keeps its bytes. What a killed save left is removed.
    """
    assert train(unique, tmp_path, "--max-steps=2") == 0
    folder = tmp_path / "version_0"
    os.link(folder / "last.ckpt", tmp_path / "link")
    first = (tmp_path / "link").read_bytes()
    (folder / "last.ckpt.tmp-0123456789ab").write_bytes(b"half a checkpoint")
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append((str(a), str(b))), replace(a, b)))
    assert train(unique, tmp_path, "--resume") == 0
    assert (tmp_path / "link").read_bytes() == first and checkpoint(tmp_path)["global_step"] == 11
    for name in ("last.ckpt", "best.ckpt"):
        [at] = [n for n, call in enumerate(calls) if call[1] == f"{folder}/{name}"]
        assert calls[at - 1] == calls[at][0] and calls[at + 1] == str(folder)
    assert not list(tmp_path.rglob("*.tmp-*"))


def test_a_full_disk_keeps_the_previous_checkpoint(unique, tmp_path, capsys):
    """The disk has space for no checkpoint at first, then for one and a half."""
    disk = tmp_path / "disk"
    small_disk(disk, "size=1m")
    try:
        assert train(unique, disk, runs.SMALL[0], "--max-steps=2") == 1
        assert "No space left on device; there is no previous one" in runs.one_line(capsys)
        assert not list(disk.rglob("*.ckpt*"))
        shutil.rmtree(disk / "version_0")
        assert os.system(f"mount -o remount,size=4700k '{disk}'") == 0
        assert train(unique, disk, runs.SMALL[0], "--max-steps=2") == 0
        last = disk / "version_0" / "last.ckpt"
        previous = last.read_bytes()
        assert train(unique, disk, runs.SMALL[0], "--max-steps=4", "--resume") == 1
        error = f"{last}: can't save the checkpoint: No space left on device; the previous one is kept"
        assert runs.one_line(capsys) == f"imagenet_train.py: {error}"
        assert last.read_bytes() == previous and not list(disk.rglob("*.tmp-*"))
        assert os.system(f"mount -o remount,size=20m '{disk}'") == 0
        assert train(unique, disk, runs.SMALL[0], "--max-steps=4", "--resume") == 0
        assert checkpoint(disk)["global_step"] == 4
    finally:
        os.system(f"umount '{disk}'")


def test_the_best_score_survives_another_path(unique, tmp_path, monkeypatch, recwarn):
    """A container's /output is the host's ./output: a worse epoch after a move does not replace best.ckpt."""
    accuracies = iter([0.8, 0.4, 0.9])
    log_dict = script.Classifier.log_dict
    monkeypatch.setattr(script.Classifier, "log_dict", lambda self, values, **options: log_dict(
        self, values | ({"val_top1": next(accuracies)} if "val_top1" in values else {}), **options))
    assert train(unique, tmp_path / "a") == 0
    best = (tmp_path / "a/version_0/best.ckpt").read_bytes()
    (tmp_path / "a").rename(tmp_path / "b")
    assert train(unique, tmp_path / "b", "--resume", "--max-epochs=2") == 0
    assert (tmp_path / "b/version_0/best.ckpt").read_bytes() == best
    assert train(unique, tmp_path / "b", "--resume", "--max-epochs=3") == 0
    assert checkpoint(tmp_path / "b", "best.ckpt")["epoch"] == 2
    assert train(unique, tmp_path / "c", "--max-steps=1") == 0  # no score yet
    (tmp_path / "c").rename(tmp_path / "d")
    assert train(unique, tmp_path / "d", "--resume", "--max-steps=2") == 0
    assert not [str(warning.message) for warning in recwarn if "dirpath" in str(warning.message)]


# ---------------------------------------------------------------- killed, and resumed as it was


def test_killed_within_between_and_within_epochs(unique, tmp_path):
    """Of 2 epochs of 11 steps; no step is made twice with a checkpoint after each."""
    flags = [f"--shards={unique}", "--max-epochs=2", "--checkpoint-every=1", "--resume"]
    run(tmp_path / "whole", *flags, workers=2)
    for step in (3, 11, 17):
        run(tmp_path / "killed", *flags, workers=2, kill=("train", step), expect=-signal.SIGKILL)
    run(tmp_path / "killed", *flags, workers=2)
    killed, whole = ([line[:4] for line in diary(tmp_path / name)] for name in ("killed", "whole"))
    assert killed == whole and len([line for line in whole if line[2] == "train"]) == 2 * STEPS
    assert_same_weights(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_random_moments(unique, tmp_path, elsewhere, ranks):
    """SIGKILL or SIGTERM of any rank or of all; at the end the weights of an undisturbed run."""
    flags = [f"--shards=pipe:cat {unique}/", "--max-epochs=4", f"--checkpoint-every={3 - ranks}", "--resume"]
    run(tmp_path / "whole", *flags, ranks=ranks)
    folder, rng, kills = tmp_path / "killed", random.Random(), 0
    book = folder / "rank-0.jsonl"
    for _ in range(KILLS):
        size = book.stat().st_size if book.exists() else 0
        processes = start(folder, *flags, ranks=ranks)
        while rng.random() < 0.99 and processes[0].is_alive() and (not book.exists() or book.stat().st_size == size):
            time.sleep(0.01)  # mostly until it makes steps, sometimes before
        time.sleep(rng.uniform(0, 0.1))
        for process in rng.sample(processes, rng.randint(1, ranks)):
            rng.choice([process.kill, process.terminate])()
            process.join()
            kills += process.exitcode in (-signal.SIGKILL, 143)
        for process in processes:  # what torchrun does with the others
            process.join(1)
            process.kill()
        exit_codes(processes)
        for path in folder.rglob("*.ckpt"):
            torch.load(path, weights_only=True)
    assert kills >= KILLS // 2, log(folder)
    print(f"{kills} processes killed")
    run(folder, *flags, ranks=ranks)
    for rank in range(ranks):
        assert steps(folder, rank) == steps(tmp_path / "whole", rank)
    assert len(steps(folder)) == 4 * (STEPS // ranks)
    assert_same_weights(folder, tmp_path / "whole")
    assert "Traceback" not in log(folder)


@pytest.mark.parametrize("changed, source", [(BATCH, "{}"), (2, "{}"), (8, "pipe:cat {}/%s")])
def test_killed_in_validation_it_validates_again(unique, tmp_path, changed, source):
    """Also when --checkpoint-every falls on the epoch's last step. The next epoch has the new number of steps."""
    flags = ["--max-epochs=2", f"--checkpoint-every={STEPS}", "--resume"]
    run(tmp_path, f"--shards={unique}", *flags, kill=("val", 0), expect=-signal.SIGKILL)
    assert not list(tmp_path.rglob("last.ckpt"))
    run(tmp_path, f"--shards={unique}", *flags, kill=("val", 1), expect=-signal.SIGKILL)
    run(tmp_path, f"--shards={source.format(unique)}", *flags, f"--batch-size={changed}")
    assert "resuming at the start of epoch 2" in log(tmp_path)
    assert [epoch for epoch, _ in re.findall(VALIDATED, log(tmp_path))] == ["epoch 1", "epoch 2"]
    assert re.findall(VALIDATED, log(tmp_path))[1][1] == str(STEPS + TRAIN_IMAGES // changed)
    labels = Counter(itertools.chain(*runs.batches(tmp_path, 0, "train", 1)[-(TRAIN_IMAGES // changed):]))
    assert max(labels.values()) == 1 and len(labels) == TRAIN_IMAGES // changed * changed


def test_max_steps_and_then_more(unique, tmp_path):
    """Stopped by --max-steps within an epoch and continued: no batch is lost or made twice."""
    for limit in (7, 18):
        run(tmp_path / "parts", f"--shards={unique}", f"--max-steps={limit}", "--max-epochs=2", "--resume")
    run(tmp_path / "whole", f"--shards={unique}", "--max-steps=18", "--max-epochs=2")
    assert len(diary(tmp_path / "parts")) == len(diary(tmp_path / "whole"))
    assert steps(tmp_path / "parts") == steps(tmp_path / "whole")
    assert_same_weights(tmp_path / "parts", tmp_path / "whole")


def test_two_runs_resume_in_one_folder(unique, tmp_path):
    """By mistake: both end, and the checkpoint of one of them stays, complete."""
    flags = [f"--shards={unique}", "--max-epochs=3", "--checkpoint-every=1", f"--output={tmp_path}/out"]
    run(tmp_path / "first", *flags, "--max-steps=1")
    processes = [start(tmp_path / name, *flags, "--resume")[0] for name in ("a", "b")]
    assert exit_codes(processes) == [0, 0], log(tmp_path / "a") + log(tmp_path / "b")
    assert checkpoint(tmp_path)["global_step"] == 3 * STEPS and not list(tmp_path.rglob("*.tmp-*"))


# ---------------------------------------------------------------- resumed with other settings


def used(folder: Path, epoch: int) -> dict[int, list[int]]:
    """Step → the labels that all ranks trained on in it; of a step that was made again those of the last time."""
    made = {(step, path.stem): labels for path in folder.glob("rank-*.jsonl")
            for e, step, kind, labels, _ in diary(folder, int(path.stem[-1])) if (e, kind) == (epoch, "train")}
    found: dict[int, list[int]] = {}
    for (step, _), labels in sorted(made.items()):
        found.setdefault(step, []).extend(label for label in labels if label != script.IGNORE_INDEX)
    return found


def test_an_epoch_in_three_runs_on_one_two_and_three_ranks(unique, tmp_path):
    """Killed within an epoch, twice: each sample is used at most once in the epoch; all epochs are validated."""
    flags = ["--max-epochs=2", "--checkpoint-every=1", "--resume"]
    killed = dict(expect=-signal.SIGKILL)
    run(tmp_path, f"--shards={unique}", *flags, workers=2, kill=("train", 3), **killed)
    run(tmp_path, f"--shards={unique}", *flags, "--batch-size=2", ranks=2, workers=0, kill=("train", 5), **killed)
    out = run(tmp_path, f"--shards=pipe:cat {unique}/%s", *flags, "--batch-size=3", "--shuffle=9", ranks=3, workers=3)
    assert "resuming in epoch 1 after 3 of 11 batches, begun with other settings, with 2 ranks x 1 worker x" in out
    assert "resuming in epoch 1 after 5 of 8 batches, begun with other settings, with 3 ranks x 3 workers x" in out
    assert [epoch for epoch, _ in re.findall(VALIDATED, out)] == ["epoch 1", "epoch 2"]
    made = used(tmp_path, 0)
    assert [len(made[step]) for step in range(8)] == [BATCH] * 3 + [4] * 2 + [9] * 3
    labels = list(itertools.chain(*made.values()))
    assert len(made) == 8 and len(labels) == len(set(labels)) == 47
    history = [script.Division(True, 1, 2, BATCH, 5, 3), script.Division(True, 2, 1, 2, 5, 2),
               script.Division(False, 3, 3, 3, 9, 3)]
    assert script.plan_epoch(script.read_index(str(unique), "train"), True, 0, 0, history)[1].sum() == len(labels)
    second = Counter(itertools.chain(*used(tmp_path, 1).values()))
    assert max(second.values()) == 1 and len(used(tmp_path, 1)) == TRAIN_IMAGES // 9


@pytest.mark.parametrize("batch, sizes", [(16, [4] * 9 + [11]), (2, [4] * 9 + [2] * 5)], ids=["fewer", "more"])
def test_late_in_an_epoch(unique, tmp_path, batch, sizes):
    """11 samples are left: one step that is filled up, or five of two samples. The log has a line for each entry."""
    flags = [f"--shards={unique}", "--max-epochs=1", "--checkpoint-every=1", "--resume"]
    run(tmp_path, *flags, kill=("train", 9), expect=-signal.SIGKILL)
    out = run(tmp_path, *flags, f"--batch-size={batch}", "--log-every=1")
    assert re.findall(r"^Epoch 1/1, step (\d+)/(\d+): ", out, re.M)[-1] == (str(len(sizes)),) * 2
    assert len(re.findall(VALIDATED, out)) == 1
    made = used(tmp_path, 0)
    assert [len(made[step]) for step in sorted(made)] == sizes
    assert len(set(itertools.chain(*made.values()))) == sum(sizes)


def test_another_tree_of_the_same_size_is_refused_within_an_epoch(unique, tmp_path):
    """Re-sharded, with as many images: resumed as it was, it would use some images twice and some never."""
    assert convert(unique.parent / "tree", tmp_path / "other", "--maxcount=9", "--block-size=4", "--seed=1") == 0
    run(tmp_path, f"--shards={unique}", "--max-steps=3")
    run(tmp_path, f"--shards={tmp_path}/other", "--resume", expect=1)
    assert "--resume: the checkpoint is within an epoch of other data or another order (index " in log(tmp_path)
