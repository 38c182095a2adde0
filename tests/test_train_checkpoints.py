"""Checkpoints: whatever ends a run, at whatever moment, --resume continues with the same batches, on any settings."""

import itertools
import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import runs
import torch
from conftest import TRAIN_IMAGES, VAL_IMAGES, convert
from faults import small_disk
from runs import BATCH, assert_same_weights, checkpoint, diary, exit_codes, log, rows, run, start, steps, train

import imagenet_train as script

STEPS = TRAIN_IMAGES // BATCH
KILLS = int(os.environ.get("KILLS", 4))  # at random moments, for each number of ranks
VALIDATED = rf"validated {VAL_IMAGES}/{VAL_IMAGES} images: .* \((epoch \d), step (\d+)\)"


def test_a_new_file_replaces_the_previous_one(unique, tmp_path, monkeypatch):
    """First the file's bytes are on the disk, then it gets its name. What a killed save left is overwritten.

    A link to the previous file keeps its bytes.
    """
    assert train(unique, tmp_path, "--max-steps=2") == 0
    folder = tmp_path / "version_0"
    os.link(folder / "last.ckpt", tmp_path / "link")
    first = (tmp_path / "link").read_bytes()
    (folder / "last.ckpt.tmp").write_bytes(b"half a checkpoint")
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append((str(a), str(b))), replace(a, b)))
    assert train(unique, tmp_path, "--resume") == 0
    assert (tmp_path / "link").read_bytes() == first and checkpoint(tmp_path)["global_step"] == 11
    for path in (f"{folder}/last.ckpt", f"{folder}/best.ckpt"):
        [at] = [n for n, call in enumerate(calls) if call[1] == path]
        assert calls[at] == (f"{path}.tmp", path) and f"{path}.tmp" in calls[:at]
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_full_disk_keeps_the_previous_checkpoint(unique, tmp_path, capsys):
    """The disk has space for no checkpoint at first, then for one and a half."""
    disk = tmp_path / "disk"
    small_disk(disk, "size=1m")
    try:
        assert train(unique, disk, runs.SMALL[0], "--max-steps=2") == 1
        assert "last.ckpt: not written: No space left on device; " in runs.one_line(capsys)
        assert not list(disk.rglob("*.ckpt*"))
        shutil.rmtree(disk / "version_0")
        assert os.system(f"mount -o remount,size=4700k '{disk}'") == 0
        assert train(unique, disk, runs.SMALL[0], "--max-steps=2") == 0
        last = disk / "version_0" / "last.ckpt"
        previous = last.read_bytes()
        assert train(unique, disk, runs.SMALL[0], "--max-steps=4", "--resume") == 1
        assert re.search(f"{last}: .*No space left on device; the previous .* is kept", runs.one_line(capsys))
        assert last.read_bytes() == previous and not list(disk.rglob("*.tmp"))
        assert os.system(f"mount -o remount,size=20m '{disk}'") == 0
        assert train(unique, disk, runs.SMALL[0], "--max-steps=4", "--resume") == 0
        assert checkpoint(disk)["global_step"] == 4
    finally:
        os.system(f"umount '{disk}'")


def test_the_best_score_survives_another_path(unique, tmp_path, monkeypatch):
    """A container's /output is the host's ./output: a worse epoch after a move does not replace best.ckpt."""
    accuracies = iter([0.8, 0.4, 0.9])
    validated = script.Classifier.on_validation_epoch_end

    def with_accuracy(self) -> None:
        validated(self)
        self.result["val_top1"] = next(accuracies)

    monkeypatch.setattr(script.Classifier, "on_validation_epoch_end", with_accuracy)
    assert train(unique, tmp_path / "a") == 0
    best = (tmp_path / "a/version_0/best.ckpt").read_bytes()
    (tmp_path / "a").rename(tmp_path / "b")
    assert train(unique, tmp_path / "b", "--resume", "--max-epochs=2") == 0
    assert (tmp_path / "b/version_0/best.ckpt").read_bytes() == best
    assert train(unique, tmp_path / "b", "--resume", "--max-epochs=3") == 0
    assert checkpoint(tmp_path / "b", "best.ckpt")["epoch"] == 2


# ---------------------------------------------------------------- killed, and resumed as it was


def used(folder: Path, epoch: int) -> dict[int, list[int]]:
    """Step → the labels that all ranks trained on in it; of a step that was made again those of the last time."""
    made = {(step, path.stem): labels for path in folder.glob("rank-*.jsonl")
            for e, step, kind, labels, _ in diary(folder, int(path.stem[-1])) if (e, kind) == (epoch, "train")}
    found: dict[int, list[int]] = {}
    for (step, _), labels in sorted(made.items()):
        found.setdefault(step, []).extend(label for label in labels if label != script.IGNORE_INDEX)
    return found


def test_killed_within_between_and_within_epochs(unique, tmp_path):
    """Of 2 epochs of 11 steps; no step is made twice with a checkpoint after each. A cut line of metrics.csv goes."""
    flags = [f"--shards={unique}", "--max-epochs=2", "--checkpoint-every=1", "--resume"]
    run(tmp_path / "whole", *flags, workers=2)
    for step in (3, 11, 17):
        run(tmp_path / "killed", *flags, workers=2, kill=("train", step), expect=-signal.SIGKILL)
        with open(tmp_path / "killed/out/version_0/metrics.csv", "a") as file:
            file.write("0.5,0.1")
    run(tmp_path / "killed", *flags, workers=2)
    logged = [[row["step"], row["epoch"], row["lr"], row["val_loss"]] for row in rows(tmp_path / "killed")]
    assert logged == [[row["step"], row["epoch"], row["lr"], row["val_loss"]] for row in rows(tmp_path / "whole")]
    killed, whole = ([line[:4] for line in diary(tmp_path / name)] for name in ("killed", "whole"))
    assert killed == whole and len([line for line in whole if line[2] == "train"]) == 2 * STEPS
    assert_same_weights(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_random_moments(unique, tmp_path, ranks):
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
            kills += process.exitcode in (-signal.SIGKILL, -signal.SIGTERM)
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
    assert "resuming" in log(tmp_path) and "in epoch 2 after 0 of " in log(tmp_path)
    assert [epoch for epoch, _ in re.findall(VALIDATED, log(tmp_path))] == ["epoch 1", "epoch 2"]
    assert re.findall(VALIDATED, log(tmp_path))[1][1] == str(STEPS + TRAIN_IMAGES // changed)
    labels = Counter(itertools.chain(*runs.batches(tmp_path, 0, "train", 1)[-(TRAIN_IMAGES // changed):]))
    assert max(labels.values()) == 1 and len(labels) == TRAIN_IMAGES // changed * changed


@pytest.mark.parametrize("commands, epochs", [
    (["--max-epochs=1", "--max-epochs=3 --max-steps=1000"], [11, 11, 11]),
    (["--max-epochs=1", "--max-epochs=2 --max-steps=15"], [11, 4]),
    (["--max-epochs=1", "--max-epochs=3 --max-steps=1000 --batch-size=8"], [11, 5, 5]),
    (["--max-epochs=2 --max-steps=7", "--max-epochs=2 --max-steps=11", "--max-epochs=2 --max-steps=15"], [11, 4]),
    (["--max-epochs=3 --max-steps=30 KILL", "--max-epochs=3 --max-steps=30"], [11, 11, 8]),
])
def test_max_steps_and_then_more(unique, tmp_path, commands, epochs):
    """Ended within, at and after an epoch, and resumed: no epoch is skipped, no batch is lost or made twice.

    KILL: in the second epoch. The weights are those of an undisturbed run, if that has the same settings.
    """
    flags = [f"--shards={unique}", "--checkpoint-every=1", "--resume"]
    for command in commands:
        moment = dict(kill=("train", 14), expect=-signal.SIGKILL) if "KILL" in command else {}
        run(tmp_path / "parts", *flags, *command.removesuffix(" KILL").split(), **moment)
    made = steps(tmp_path / "parts")
    assert sorted(made) == list(range(sum(epochs))) and checkpoint(tmp_path / "parts")["global_step"] == sum(epochs)
    assert [len(used(tmp_path / "parts", epoch)) for epoch in range(len(epochs))] == epochs
    whole = [steps for steps in epochs if steps in (STEPS, TRAIN_IMAGES // 8)]
    assert len(re.findall(VALIDATED, log(tmp_path / "parts"))) == len(whole)  # not where --max-steps ends a run
    if len({re.match("--max-epochs=.", command)[0] for command in commands}) == 1:  # the learning rate follows it
        run(tmp_path / "whole", *flags, *commands[-1].split())
        assert made == steps(tmp_path / "whole")
        assert_same_weights(tmp_path / "parts", tmp_path / "whole")


def test_of_two_runs_that_resume_one_folder_the_second_is_refused(unique, tmp_path):
    """While the first one writes there; not after it was killed."""
    flags = [f"--shards={unique}", "--max-epochs=3", f"--output={tmp_path}/out", "--resume"]
    run(tmp_path / "first", *flags, "--max-steps=1")
    stall = f"--shards=pipe:case %s in *train*.tar) touch {tmp_path}/stalled; sleep 60;; esac; cat {unique}/%s"
    [first] = start(tmp_path / "a", *flags, stall)
    runs.wait_for(tmp_path / "stalled")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out/version_0").iterdir()}
    assert re.search("version_0: another run is writing there; ", run(tmp_path / "b", *flags, expect=1))
    assert {path.name: path.read_bytes() for path in (tmp_path / "out/version_0").iterdir()} == before
    first.kill()
    first.join()
    run(tmp_path / "b", *flags)
    assert checkpoint(tmp_path)["global_step"] == 3 * STEPS


# ---------------------------------------------------------------- resumed with other settings


def test_an_epoch_in_three_runs_on_one_two_and_three_ranks(unique, tmp_path):
    """Killed within an epoch, twice: each sample is used at most once in the epoch; all epochs are validated."""
    flags = ["--max-epochs=2", "--checkpoint-every=1", "--resume"]
    killed = dict(expect=-signal.SIGKILL)
    run(tmp_path, f"--shards={unique}", *flags, workers=2, kill=("train", 3), **killed)
    run(tmp_path, f"--shards={unique}", *flags, "--batch-size=2", ranks=2, workers=0, kill=("train", 5), **killed)
    out = run(tmp_path, f"--shards=pipe:cat {unique}/%s", *flags, "--batch-size=3", "--shuffle=9", ranks=3, workers=3)
    assert "last.ckpt in epoch 1 after 3 of 11 batches, with 2 ranks x 1 worker x batch 2" in out
    assert "last.ckpt in epoch 1 after 5 of 8 batches, with 3 ranks x 3 workers x batch 3" in out
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


def test_late_in_an_epoch(unique, tmp_path):
    """11 samples are left: one step that is filled up, or five of two samples."""
    flags = [f"--shards={unique}", "--max-epochs=1", "--checkpoint-every=1", "--resume"]
    run(tmp_path / "fewer", *flags, kill=("train", 9), expect=-signal.SIGKILL)
    shutil.copytree(tmp_path / "fewer", tmp_path / "more")
    for name, batch, sizes in (("fewer", 16, [4] * 9 + [11]), ("more", 2, [4] * 9 + [2] * 5)):
        out = run(tmp_path / name, *flags, f"--batch-size={batch}", "--log-every=1")
        assert re.findall(r"^Epoch 1/1, step (\d+)/(\d+): ", out, re.M)[-1] == (str(len(sizes)),) * 2
        made = used(tmp_path / name, 0)
        assert [len(made[step]) for step in sorted(made)] == sizes
        assert len(re.findall(VALIDATED, out)) == 1 and len(set(itertools.chain(*made.values()))) == sum(sizes)


def test_another_tree_of_the_same_size_is_refused_within_an_epoch(unique, tmp_path):
    """Re-sharded, with as many images: resumed as it was, it would use some images twice and some never."""
    assert convert(unique.parent / "tree", tmp_path / "other", "--maxcount=9", "--block-size=4", "--seed=1") == 0
    run(tmp_path, f"--shards={unique}", "--max-steps=3")
    run(tmp_path, f"--shards={tmp_path}/other", "--resume", expect=1)
    assert "--resume: the checkpoint is within an epoch of other data or another order (index " in log(tmp_path)
