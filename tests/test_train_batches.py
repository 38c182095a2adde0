"""Images → batches → epochs: what a Loader makes in real loader processes, in one's own loop and after a resume."""

import gc
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path

import pytest
import torch
from conftest import TRAIN_IMAGES, VAL_IMAGES, convert
from faults import ended, killed, small_shm
from packed import samples
from reading import at
from runs import SCRIPT, in_terminal, one_line, train

import imagenet_train as script
from imagenet_shards import UserError, read_index
from imagenet_train import IGNORE_INDEX, Loader, LoaderConfig, plan_epoch

BATCH = 4
STEPS = TRAIN_IMAGES // BATCH


def labels_of(loader: Loader) -> list[list[int]]:
    """The labels of every batch of an epoch; where a label names an image, its samples."""
    return [labels.tolist() for _, labels in loader]


def train_config(shards: Path | str, **changes) -> LoaderConfig:
    return replace(LoaderConfig(read_index(str(shards), "train"), True, BATCH, 32, shuffle=9, retry_for=0), **changes)


def planned(shards: Path, config: LoaderConfig, epoch: int = 0) -> list[list[int]]:
    """The labels that the order of an epoch lists for a loader."""
    labels = [label for _, label, _ in samples(shards, "train")]
    plan, _ = plan_epoch(config.index, True, config.seed, epoch, [config.division])
    return [[labels[n] for n in batch] for batch in plan[config.rank].tolist()]


def error_of(config: LoaderConfig, kind: type[Exception] = UserError) -> str:
    """What an epoch fails with."""
    with pytest.raises(kind) as error:
        list(Loader(config))
    text = str(error.value)
    del error
    gc.collect()  # its traceback holds the loader, and that its processes
    return text


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize("world, batch, workers", [(3, 10, 2), (40, 1, 0)])
def test_validation_batches_are_full_and_every_sample_is_in_one_of_them(unique, world, batch, workers):
    """All ranks make as many batches, also those without samples."""
    index, seen = read_index(str(unique), "val"), []
    for rank in range(world):
        loader = Loader(LoaderConfig(index, False, batch, 32, 36, rank=rank, world=world, workers=workers))
        for _ in range(2):  # a loader of validation makes the same batches again
            batches = list(loader)
            assert len(batches) == len(loader) == 2
        for images, labels in batches:
            assert images.shape == (batch, 32, 32, 3) and images.dtype == torch.uint8
            assert labels.shape == (batch,) and labels.dtype == torch.int64
            seen += [label for label in labels.tolist() if label != IGNORE_INDEX]
    assert sorted(seen) == list(range(VAL_IMAGES))


@pytest.mark.parametrize("workers", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("source", ["{}", "pipe:cat {}/%s"])
def test_a_loader_delivers_what_the_order_lists_epoch_after_epoch(unique, workers, source):
    """From the same processes, which go on into the next epoch; and they end with the loader."""
    before, processes = {process.pid for process in multiprocessing.active_children()}, set()
    loader = Loader(train_config(source.format(unique), workers=workers, world=2, rank=1, batch=3))
    for epoch in range(3):
        assert labels_of(loader) == planned(unique, loader.config, epoch)
        assert loader.epoch == epoch and len(loader) == 7
        processes |= {process.pid for process in multiprocessing.active_children()} - before
    assert len(processes) == workers
    del loader
    assert not {process.pid for process in multiprocessing.active_children()} & processes


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_loader_resumes_anywhere(unique, workers):
    """From any place in the epoch, the rest of it, and the next one, are the same to the last pixel."""
    config = train_config(unique, workers=workers)
    loader, states, epochs = Loader(config), [], [[], []]
    for epoch in epochs:
        for batch in loader:
            epoch.append([part.clone() for part in batch])
            states.append(loader.state_dict())
    for done in (1, 2, 5, 10):
        resumed = Loader(config)
        resumed.load_state_dict(states[done - 1])
        assert (resumed.epoch, resumed.done, len(resumed)) == (0, done, STEPS)
        for whole in (epochs[0][done:], epochs[1]):
            for (a, b), (c, d) in zip(resumed, whole, strict=True):
                assert torch.equal(a, c) and torch.equal(b, d)
    assert (states[STEPS - 1]["epoch"], states[STEPS - 1]["history"]) == (1, [])


@pytest.mark.parametrize("workers", [1, 2])
def test_a_batch_and_the_one_before_stay_valid(unique, workers):
    """Although their memory is used again: the workers have all the time to make what they may."""
    taken = []
    for images, _ in Loader(train_config(unique, workers=workers)):
        taken.append((images, images.clone()))
        time.sleep(0.1)
        assert all(torch.equal(kept, clone) for kept, clone in taken[-2:])
    assert len(taken) == STEPS and len({images.data_ptr() for images, _ in taken}) <= 4 * workers


def test_position_is_the_share_of_the_epoch_that_is_used(unique):
    loader = Loader(train_config(unique))
    places = [loader.position for _ in loader]
    assert places == [(n * BATCH / TRAIN_IMAGES, (n + 1) * BATCH / TRAIN_IMAGES) for n in range(STEPS)]
    next(iter(loader))
    assert loader.position == (1, 1 + BATCH / TRAIN_IMAGES)


@pytest.mark.parametrize("workers", [0, 2])
def test_iterators_of_a_loader_share_its_epoch(unique, workers):
    """They read nothing before a batch is asked for, and end with the epoch; Lightning calls iter() more than once."""
    loader = Loader(train_config(unique, workers=workers))
    a, b, c = (iter(loader) for _ in range(3))
    assert (loader.epoch, loader.done, loader.batches) == (0, 0, None)
    assert [next(each)[1].tolist() for each in islice(cycle([a, b]), STEPS)] == planned(unique, loader.config)
    first = next(c)[1].tolist()
    assert [*a, *b] == [] and [first] + [labels.tolist() for _, labels in c] == planned(unique, loader.config, 1)


OWN_LOOP = """
import imagenet_train as script
config = script.LoaderConfig(script.read_index({!r}, "train"), True, 4, 32, workers={})
for images, labels in (loader := script.Loader(config)):
    break
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loop_of_ones_own_may_break_and_end(unique, workers):
    """Nothing is printed at the end of the process, also if TMPDIR is as long as it may be."""
    with tempfile.TemporaryDirectory(prefix="x" * 62, dir="/tmp") as folder:
        assert len(folder) == 75
        done = subprocess.run([sys.executable, "-c", OWN_LOOP.format(str(unique), workers)], cwd=SCRIPT.parent,
                              env=os.environ | {"TMPDIR": folder}, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_processes_are_started_by_spawn_where_there_is_no_fork(unique, monkeypatch):
    monkeypatch.setattr(script, "START_METHOD", "spawn")
    loader = Loader(train_config(unique, workers=1))
    assert labels_of(loader) == planned(unique, loader.config)


# ---------------------------------------------------------------- loader processes that fail


def test_an_error_in_a_loader_process_is_one_line(unique, tmp_path):
    folder = shutil.copytree(unique, tmp_path / "data")
    (folder / "imagenet-train-000002.tar").unlink()
    error = error_of(train_config(folder, workers=2))
    assert "imagenet-train-000002.tar: no such file" in error and "\n" not in error


def test_a_long_tmpdir_is_one_line_at_once(unique, tmp_path, monkeypatch, capsys):
    """In the script and in a loop of one's own: loader processes could not hand over their batches."""
    monkeypatch.setattr(tempfile, "tempdir", "/tmp/" + "x" * 71)
    monkeypatch.setattr(script, "HANG_TIMEOUT", 30)  # of a version that does not see it
    assert re.match("TMPDIR=/tmp/x{71}: .*shorter", error_of(train_config(unique, workers=1)))
    assert train(unique, tmp_path / "out", "--workers=1") == 1
    assert "TMPDIR=/tmp/xxx" in one_line(capsys)


def test_a_fault_of_the_program_in_a_loader_process_keeps_its_traceback(unique, monkeypatch):
    monkeypatch.setattr(script, "decode", lambda *args, **kwargs: [][0])
    error = error_of(train_config(unique, workers=2), IndexError)
    assert "in <lambda>" in error and script.explain_failure(IndexError(error)) is None


KILL, HANG = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL), lambda *args, **kwargs: time.sleep(1000)
KILLED = r"use fewer --workers.*DataLoader worker \(pid.*(killed|exited)"


def step(self, batch: list, number: int) -> None:
    """PyTorch raises at any line of the main process when a loader process is killed."""
    for process in self.trainer.train_dataloader.batches._workers:
        process.kill()
    time.sleep(30)  # in which the signal of the children's end arrives


FAILURES = {
    "killed at its start": (script, "start_worker", KILL, KILLED),
    "killed at work": (script, "decode", KILL, KILLED),
    "killed during a step": (script.Classifier, "training_step", step, KILLED),
    "hanging": (script, "decode", HANG, "a loader process hangs: rerun with --resume.*timed out after 1.0 seconds"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_killed_or_hanging_loader_process_is_one_line(unique, tmp_path, monkeypatch, capfd, failure):
    where, name, replacement, said = FAILURES[failure]
    # Lightning takes PyTorch's handler away when a fit ends; PyTorch sets it once in a process.
    monkeypatch.setattr(torch.utils.data._utils.signal_handling, "_SIGCHLD_handler_set", False)
    monkeypatch.setattr(script, "HANG_TIMEOUT", 1 if replacement is HANG else 60)
    monkeypatch.setattr(where, name, replacement)
    assert train(unique, tmp_path / "out", "--workers=2", "--retry-for=0") == 1
    [line] = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
    assert re.match(f"imagenet_train.py: .*{said}", line)


def with_small_shm(size: int, work: Callable[[], int]) -> tuple[int, str]:
    """Exit status and output of work() in a process of its own, which has a /dev/shm of so many bytes."""
    status, said = in_terminal(200, lambda: 77 if small_shm(size) else work())
    if status == 77:
        pytest.skip("needs the right to mount a tmpfs")
    return status, said


@pytest.mark.parametrize("train_size, val_size, size", [(96, 32, 500_000), (32, 128, 1_000_000)])
def test_a_small_dev_shm_is_one_line(unique, tmp_path, train_size, val_size, size):
    """In training, or first in validation, whose loader processes need more of it."""
    flags = ["--workers=2", "--batch-size=8", "--checkpoint-every=4", f"--train-size={train_size}"]
    flags += [f"--val-size={val_size}", f"--val-resize={val_size}"]
    status, said = with_small_shm(size, lambda: train(unique, tmp_path, *flags))
    assert status == 1 and "Traceback" not in said, said
    [line] = re.findall("imagenet_train.py: (.*)", said)
    assert re.match("/dev/shm is full: .*--shm-size.*--workers", line), line
    assert (tmp_path / "version_0" / "last.ckpt").exists() == (train_size == 32)


def test_labels_need_no_shared_memory(unique):
    """If another process has filled it, PyTorch loses a batch that it can't send, and the main process waits for it."""

    def work() -> int:
        batches = iter(Loader(train_config(unique, workers=1)))
        assert len(list(islice(batches, 4))) == 4  # then all buffers exist
        with open("/dev/shm/rest", "wb", buffering=0) as file:
            while os.statvfs("/dev/shm").f_bfree:
                file.write(bytes(4096))
        signal.alarm(20)
        return len(list(batches))

    assert with_small_shm(10**6, work) == (STEPS - 4, "")


@pytest.mark.parametrize("prefix, processes", [("{}", 2), ("pipe:sleep 1000; cat {}/%s", 6)])
def test_nothing_outlives_a_killed_main_process(unique, prefix, processes):
    """Neither loader processes, although they wait for a block, nor commands that stall, with their guards."""
    config = train_config(unique, workers=2)

    def work() -> None:
        loader = Loader(replace(config, index=at(config.index, prefix.format(unique))))
        while True:
            list(loader)

    pids = killed(2, work)
    assert len(pids) >= processes and ended(pids)


# ---------------------------------------------------------------- images that cannot be decoded


@pytest.mark.parametrize("workers", [0, 2])
def test_undecodable_images_are_rows_that_do_not_count(copy, tmp_path, workers, capsys):
    for path in [*sorted((copy / "train").rglob("*.JPEG"))[5:26:7], next((copy / "val").rglob("*.JPEG"))]:
        path.write_bytes(b"\xff\xd8\xff" + bytes(500) + b"\xff\xd9")  # looks like a JPEG at both ends
    assert convert(copy, tmp_path / "data", "--maxcount=7", "--block-size=3") == 0
    train, val = (read_index(str(tmp_path / "data"), split) for split in ("train", "val"))
    loader = Loader(LoaderConfig(train, True, 4, 32, workers=workers, max_bad=3))
    capsys.readouterr()
    for _ in range(2):
        ignored = 0
        for images, labels in loader:
            assert images.shape == (4, 32, 32, 3)
            good = [n for n, label in enumerate(labels.tolist()) if label != IGNORE_INDEX]
            for row in set(range(4)) - set(good):  # the pixels of a good row
                assert torch.equal(images[row], images[good[0]])
                ignored += 1
        assert ignored == 3 == loader.bad
        lines = capsys.readouterr().err.splitlines()
        pattern = r".* not used: imagenet-train-00000\d.tar: \w+: neither JPEG nor PNG"
        assert len(lines) == 3 and all(re.fullmatch(pattern, line) for line in lines)
    for changes, said in (
        ({"max_bad": 2}, "3 undecodable images in an epoch, --max-bad=2; last: imagenet-train"),
        ({"batch": 1}, "none of 1 image of a batch can be decoded: imagenet-train-"),
        ({"index": val, "training": False, "max_bad": 0}, "1 undecodable image in an epoch, --max-bad=0; last: imagen"),
    ):
        assert said in error_of(replace(loader.config, **changes))


# ---------------------------------------------------------------- resume with other settings


def test_within_an_epoch_another_index_seed_or_order_is_refused(unique, shards, monkeypatch):
    loader = Loader(train_config(unique))
    list(islice(loader, 3))
    state = loader.state_dict()
    with pytest.raises(UserError, match="within an epoch of other data or another order .*index .* there"):
        Loader(train_config(shards)).load_state_dict(state)
    with pytest.raises(UserError, match="seed 0 there, 1 here"):
        Loader(train_config(unique, seed=1)).load_state_dict(state)
    monkeypatch.setattr(script, "divide", lambda line, *args, divide=script.divide: divide(line[::-1], *args))
    with pytest.raises(UserError, match="order [0-9a-f]{16} there, [0-9a-f]{16} here"):
        Loader(train_config(unique)).load_state_dict(state)
    monkeypatch.undo()
    other = Loader(train_config(shards, seed=1))
    other.load_state_dict(state | {"history": [], "order": "", "epoch": 3})  # between epochs anything may change
    assert other.epoch == 3 and len(labels_of(other)) == 15


CHANGED = {
    "workers": {"workers": 3}, "batch": {"batch": 3}, "shuffle": {"shuffle": 0}, "ranks": {"world": 3},
    "all": {"world": 2, "batch": 5, "workers": 1, "shuffle": 30}, "a step for all": {"world": 2, "batch": 20},
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGED)
@pytest.mark.parametrize("source", ["{}", "pipe:cat {}/%s"])
def test_an_epoch_is_resumed_with_other_settings_or_another_kind_of_source(unique, name, source):
    """Each sample at most once in the epoch, over all ranks; what is left is less than a step."""
    before, used = train_config(unique, workers=2, world=2), []
    for rank in range(2):
        loader = Loader(replace(before, rank=rank))
        used += [label for _, labels in islice(loader, 3) for label in labels.tolist()]
    assert len(used) == 3 * 2 * BATCH
    after, steps = replace(train_config(source.format(unique)), **{"world": 1} | CHANGED[name]), set()
    for rank in range(after.world):
        resumed = Loader(replace(after, rank=rank))
        between = Loader(replace(after, rank=rank, batch=2))  # stopped again before a batch was used
        between.load_state_dict(loader.state_dict())
        resumed.load_state_dict(between.state_dict())
        assert resumed.done == 3
        batches = labels_of(resumed)
        steps.add(len(batches))
        used += [label for batch in batches for label in batch if label != IGNORE_INDEX]
        assert labels_of(resumed) == planned(unique, resumed.config, 1) and resumed.epoch == 1
    assert len(steps) == 1 and max(Counter(used).values()) == 1
    left = TRAIN_IMAGES - 3 * 2 * BATCH
    assert TRAIN_IMAGES - len(used) == (left % (after.world * after.batch) if left > after.world * after.batch else 0)
