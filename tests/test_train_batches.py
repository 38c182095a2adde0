"""Images → batches → epochs: what a Loader makes in real loader processes, in one's own loop and after a resume."""

import multiprocessing
import os
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from conftest import TRAIN_IMAGES, VAL_IMAGES, convert
from faults import ended, killed, small_shm
from packed import samples
from reading import at
from runs import in_terminal, train

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


def planned(shards: Path, loader: Loader) -> list[list[int]]:
    """The labels that the order of the epoch lists for a loader at its beginning."""
    config, labels = loader.config, [label for _, label, _ in samples(shards, "train")]
    plan, _ = plan_epoch(config.index, True, config.seed, loader.epoch, [config.division])
    return [[labels[n] for n in batch] for batch in plan[config.rank].tolist()]


def error_of(config: LoaderConfig, kind: type[Exception] = UserError) -> Exception:
    """What an epoch fails with."""
    loader = Loader(config)
    with pytest.raises(kind) as error:
        list(loader)
    loader.batches = None  # the error's traceback holds the loader, and that its processes
    return error.value


# ---------------------------------------------------------------- batches


def test_validation_batches_are_full_and_every_sample_is_in_one_of_them(unique):
    index, seen = read_index(str(unique), "val"), []
    for rank in range(3):
        loader = Loader(LoaderConfig(index, False, 10, 32, 36, rank=rank, world=3, workers=2))
        for _ in range(2):  # a loader of validation makes the same batches again
            batches = list(loader)
            assert len(batches) == len(loader) == 2
        for images, labels in batches:
            assert images.shape == (10, 32, 32, 3) and images.dtype == torch.uint8
            assert labels.shape == (10,) and labels.dtype == torch.int64
            seen += [label for label in labels.tolist() if label != IGNORE_INDEX]
    assert sorted(seen) == list(range(VAL_IMAGES))


def test_a_rank_without_samples_makes_as_many_batches_as_the_others(unique):
    config = LoaderConfig(read_index(str(unique), "val"), False, 1, 32, 36, world=40)
    labels = [labels_of(Loader(replace(config, rank=rank))) for rank in range(40)]
    assert {len(batches) for batches in labels} == {2}
    assert sorted(label for batches in labels for [label] in batches if label >= 0) == list(range(VAL_IMAGES))


@pytest.mark.parametrize("workers", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("source", ["{}", "pipe:cat {}/%s"])
def test_a_loader_delivers_what_the_order_lists_epoch_after_epoch(unique, workers, source):
    """From the same processes, which go on into the next epoch; and they end with the loader."""
    before, processes = {process.pid for process in multiprocessing.active_children()}, set()
    loader = Loader(train_config(source.format(unique), workers=workers, world=2, rank=1, batch=3))
    for epoch in range(3):
        loader.advance()
        assert loader.epoch == epoch and len(loader) == 7
        assert planned(unique, loader) == labels_of(loader)
        processes |= {process.pid for process in multiprocessing.active_children()} - before
    assert len(processes) == workers
    del loader
    assert not {process.pid for process in multiprocessing.active_children()} & processes


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_in_a_loop_of_ones_own(unique, workers):
    """One loader for all epochs moves on to the next one; a new loader begins with the first."""
    config, loader = train_config(unique, workers=workers), Loader(train_config(unique, workers=workers))
    one, new = [], []
    for _ in range(2):
        one.append([labels.tolist() for images, labels in loader])
        new.append([labels.tolist() for images, labels in Loader(config)])
    assert new == [one[0]] * 2 and one[1] != one[0] and [len(epoch) for epoch in one] == [STEPS] * 2
    assert labels_of(Loader(replace(config, seed=1))) != one[0]


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


def test_iter_reads_nothing_before_a_batch_is_asked_for(unique):
    """Lightning calls iter() more than once."""
    loader = Loader(train_config(unique))
    iterators = [iter(loader) for _ in range(3)]
    assert (loader.epoch, loader.done, loader.batches) == (0, 0, None)
    assert [labels.tolist() for _, labels in iterators[1]] == planned(unique, Loader(loader.config))


def test_processes_are_started_by_spawn_where_there_is_no_fork(unique, monkeypatch):
    monkeypatch.setattr(script, "START_METHOD", "spawn")
    loader = Loader(train_config(unique, workers=1))
    assert planned(unique, loader) == labels_of(loader)


# ---------------------------------------------------------------- loader processes that fail


def test_an_error_in_a_loader_process_is_one_line(unique, tmp_path):
    folder = shutil.copytree(unique, tmp_path / "data")
    (folder / "imagenet-train-000002.tar").unlink()
    error = str(error_of(train_config(folder, workers=2)))
    assert "imagenet-train-000002.tar: No such file" in error and "\n" not in error


def test_a_fault_of_the_program_in_a_loader_process_keeps_its_traceback(unique, monkeypatch):
    monkeypatch.setattr(script, "decode", lambda *args, **kwargs: [][0])
    error = error_of(train_config(unique, workers=2), IndexError)
    assert "in <lambda>" in str(error) and script.explain_failure(error) is None


KILL, HANG = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL), lambda *args, **kwargs: time.sleep(1000)
KILLED = r"a loader process was killed \(.*\); is memory too small\? Use fewer --workers"


def step(self, batch: list, number: int) -> None:
    """PyTorch raises at any line of the main process when a loader process is killed."""
    for process in self.trainer.datamodule.loader.batches._workers:
        process.kill()
    time.sleep(30)  # in which the signal of the children's end arrives


FAILURES = {
    "killed at its start": (script, "start_worker", KILL, KILLED),
    "killed at work": (script, "decode", KILL, KILLED),
    "killed during a step": (script.Classifier, "training_step", step, KILLED),
    "hanging": (script, "decode", HANG, "timed out after 1.0 seconds: a loader process hangs; rerun with --resume"),
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
    assert status == 1 and said.endswith(f"imagenet_train.py: {script.SHM_FULL}\n") and "Traceback" not in said, said
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


@pytest.fixture
def blank(copy, tmp_path) -> Path:
    """Shards of the tree, in which the bytes of 3 training images and of 1 validation image are lost."""
    for split, count in (("train", 3), ("val", 1)):
        for path in sorted((copy / split).rglob("*.JPEG"))[5 : 5 + 7 * count : 7]:
            path.write_bytes(b"\xff\xd8\xff" + bytes(500) + b"\xff\xd9")  # looks like a JPEG at both ends
    assert convert(copy, tmp_path / "data", "--maxcount=7", "--block-size=3") == 0
    return tmp_path / "data"


@pytest.mark.parametrize("workers", [0, 2])
def test_undecodable_images_are_rows_that_do_not_count(blank, workers, capsys):
    loader = Loader(LoaderConfig(read_index(str(blank), "train"), True, 4, 32, workers=workers, max_bad=3))
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
        assert len(lines) == 3 and all(" not used: imagenet-train-00000" in line for line in lines)
    said = "3 undecodable images in an epoch, --max-bad=2; last: imagenet-train"
    assert said in str(error_of(replace(loader.config, max_bad=2)))
    said = "none of 1 image of a batch can be decoded: imagenet-train-"
    assert said in str(error_of(replace(loader.config, batch=1)))


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
    "all": {"world": 2, "batch": 5, "workers": 1, "shuffle": 30},
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
        for _ in range(2):  # Lightning may do so twice
            resumed.load_state_dict(loader.state_dict())
        assert resumed.done == 3
        batches = labels_of(resumed)
        steps.add(len(batches))
        used += [label for batch in batches for label in batch if label != IGNORE_INDEX]
        resumed.advance()
        assert resumed.epoch == 1 and planned(unique, resumed) == labels_of(resumed)
    assert len(steps) == 1 and max(Counter(used).values()) == 1
    assert TRAIN_IMAGES - len(used) < after.world * after.batch


def test_a_checkpoint_before_the_first_batch_of_the_new_settings(unique):
    """Resumed with other settings, and stopped again before a batch was used."""
    loader = Loader(train_config(unique))
    used = next(iter(loader))[1].tolist()
    resumed, again = Loader(train_config(unique, batch=3)), Loader(train_config(unique, batch=2))
    resumed.load_state_dict(loader.state_dict())
    again.load_state_dict(resumed.state_dict())
    assert again.done == 1 and len(again.history) == 2
    used += sum(labels_of(again), [])
    assert len(used) == len(set(used)) == 4 + 21 * 2


def test_a_rest_that_is_shorter_than_a_global_batch_makes_one_step(unique):
    """47 images, a batch of 20 done: 27 are left for two ranks of 20."""
    loader, labels = Loader(train_config(unique, batch=20)), []
    labels += next(iter(loader))[1].tolist()
    for rank, n in ((0, 14), (1, 13)):
        resumed = Loader(train_config(unique, batch=20, world=2, rank=rank))
        resumed.load_state_dict(loader.state_dict())
        assert len(resumed) == 2
        [(images, rest)] = list(resumed)
        labels += rest.tolist()[:n]
        assert rest.tolist()[n:] == [IGNORE_INDEX] * (20 - n) and torch.equal(images[19], images[0])
        assert resumed.position[1] == 1
    assert sorted(labels) == list(range(TRAIN_IMAGES))


def test_the_resumed_place_is_described(blocks):
    loader = Loader(LoaderConfig(read_index(str(blocks), "train"), True, 5, 32))
    assert loader.describe_resume() == "resuming at the start of epoch 1"
    list(islice(loader, 2))
    said, index = loader.describe_resume(), loader.config.index
    assert said.startswith("resuming in epoch 1 after 2 of 12 batches, with 1 rank x 1 worker x batch 5; ")
    _, used = plan_epoch(index, True, 0, 0, loader.history)
    shares = [(block, sum(used[start : start + block.samples])) for start, block in zip(index.starts, index.blocks)]
    again = sum(block.length for block, n in shares if 0 < n < block.samples)
    assert f"; {again / 1e6:,.1f} MB are read again" in said and again
