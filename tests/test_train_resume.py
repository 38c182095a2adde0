"""Runs that are killed and resumed with other settings: ranks, workers, batch size, shuffle buffer, kind of source."""

import itertools
import json
import re
import signal
from collections import Counter
from pathlib import Path

import pytest
from conftest import TRAIN_IMAGES, VAL_IMAGES
from test_kills import start
from test_train import BATCH, record

import imagenet_train as script

LAST = Path("out") / "version_0" / "last.ckpt"


def steps_of(folder: Path, epoch: int) -> dict[int, list[int]]:
    """Step → the labels that all ranks trained on in it. A step that was made again after a kill counts once."""
    made: dict[tuple[int, int], list[int]] = {}
    for path in folder.glob("rank-*.jsonl"):
        for line in path.read_text().splitlines():
            if line.endswith("]"):  # a kill may cut the last one
                e, step, kind, labels = json.loads(line)
                if kind == "train" and e == epoch:
                    made[step, int(path.stem.removeprefix("rank-"))] = labels
    steps: dict[int, list[int]] = {}
    for (step, _), labels in sorted(made.items()):
        steps.setdefault(step, []).extend(label for label in labels if label != script.IGNORE_INDEX)
    return steps


def test_an_epoch_in_three_runs_on_one_two_and_three_ranks(unique, tmp_path):
    """Killed within an epoch, twice: each sample is used at most once in the epoch; all epochs are validated."""
    every = ["--max-epochs=2", "--checkpoint-every=1", "--resume", f"--output={tmp_path}/out"]
    first = record(tmp_path, f"--shards={unique}", *every, DIE_AT="3", workers="2")
    assert first.returncode == -signal.SIGKILL, first.stderr
    second = record(tmp_path, f"--shards={unique}", *every, "--batch-size=2", ranks=2, workers="0", DIE_AT="5")
    assert (
        second.returncode != 0
        and "resuming in epoch 1 after 3 of 11 batches, begun with other settings" in second.stdout
    )
    third = record(
        tmp_path, f"--shards=pipe:cat {unique}/%s", *every, "--batch-size=3", "--shuffle=9", ranks=3, workers="3"
    )
    assert third.returncode == 0, third.stderr
    assert (
        "resuming in epoch 1 after 5 of 8 batches, begun with other settings, with 3 ranks x 3 readers" in third.stdout
    )
    assert re.findall(r"validated 47/47 images: .* \((epoch \d), step \d+\)", third.stdout) == ["epoch 1", "epoch 2"]

    made = steps_of(tmp_path, 0)
    assert [len(made[step]) for step in range(8)] == [BATCH] * 3 + [4] * 2 + [9] * 3
    used = list(itertools.chain(*made.values()))
    assert len(made) == 8 and len(used) == len(set(used)) == 47
    index = script.read_index(str(unique), "train")
    history = [
        script.Division(True, 1, 2, BATCH, 5, 3),
        script.Division(True, 2, 1, 2, 5, 2),
        script.Division(False, 3, 3, 3, 9, 3),
    ]
    assert script.used_samples(index, 0, 0, history).count(1) == len(used)  # what the plan says
    assert Counter(itertools.chain(*steps_of(tmp_path, 1).values())).most_common(1)[0][1] == 1
    assert len(steps_of(tmp_path, 1)) == TRAIN_IMAGES // 9


@pytest.mark.parametrize("batch, source", [(2, "{}"), (8, "pipe:cat {}/%s")], ids=["more steps", "fewer steps"])
def test_a_run_that_was_killed_in_validation_validates_that_epoch_and_trains_the_next(
    unique, tmp_path, batch, source, monkeypatch
):
    """The epoch that is over has its old number of steps, the next one the new number."""
    flags = ["--max-epochs=2", "--resume"]
    monkeypatch.setenv("DIE_IN_VALIDATION", "0")
    process = start(tmp_path / "run", f"--shards={unique}", *flags)
    process.join()
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "run" / "log").read_text()
    monkeypatch.delenv("DIE_IN_VALIDATION")
    again = start(tmp_path / "run", f"--shards={source.format(unique)}", *flags, f"--batch-size={batch}")
    again.join()
    log = (tmp_path / "run" / "log").read_text()
    assert again.exitcode == 0, log
    assert "resuming at the start of epoch 2" in log
    old, new = TRAIN_IMAGES // BATCH, TRAIN_IMAGES // batch
    found = re.findall(rf"validated {VAL_IMAGES}/{VAL_IMAGES} images: .* \((epoch \d, step \d+)\)", log)
    assert found == [f"epoch 1, step {old}", f"epoch 2, step {old + new}"]
    assert [len(steps_of(tmp_path / "run", epoch)) for epoch in (0, 1)] == [old, new]
    labels = Counter(itertools.chain(*steps_of(tmp_path / "run", 1).values()))
    assert len(labels) == new * batch and max(labels.values()) == 1


@pytest.mark.parametrize("batch, steps", [(16, [4] * 9 + [11]), (2, [4] * 9 + [2] * 5)], ids=["fewer", "more"])
def test_late_in_an_epoch(unique, tmp_path, batch, steps, monkeypatch):
    """11 samples are left: one step that is filled up, or five of two samples."""
    flags = [f"--shards={unique}", "--max-epochs=1", "--checkpoint-every=1", "--resume"]
    monkeypatch.setenv("DIE_AT", "9")
    process = start(tmp_path / "run", *flags)
    process.join()
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "run" / "log").read_text()
    monkeypatch.delenv("DIE_AT")
    again = start(tmp_path / "run", *flags, f"--batch-size={batch}")
    again.join()
    log = (tmp_path / "run" / "log").read_text()
    assert again.exitcode == 0 and f"validated {VAL_IMAGES}/{VAL_IMAGES} images" in log, log
    made = steps_of(tmp_path / "run", 0)
    assert [len(made[step]) for step in sorted(made)] == steps
    assert len(set(itertools.chain(*made.values()))) == sum(steps)


def test_another_tree_of_the_same_size_is_refused_within_an_epoch(unique, tmp_path, monkeypatch):
    """Re-sharded, with as many images: resumed as it was, it would use some images twice and some never."""
    from conftest import convert

    assert convert(unique.parent / "tree", tmp_path / "other", "--maxcount=9", "--block-size=4", "--seed=1") == 0
    flags = ["--max-epochs=1", "--checkpoint-every=1", "--resume"]
    monkeypatch.setenv("DIE_AT", "3")
    process = start(tmp_path / "run", f"--shards={unique}", *flags)
    process.join()
    monkeypatch.delenv("DIE_AT")
    again = start(tmp_path / "run", f"--shards={tmp_path}/other", *flags)
    again.join()
    assert again.exitcode == 1
    assert (
        "--resume: the checkpoint is within an epoch of other data or another order (index "
        in (tmp_path / "run" / "log").read_text()
    )
