"""One rank's batches, epoch after epoch, from real loader processes."""

import multiprocessing
import os
import shutil
import tarfile
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import TRAIN_IMAGES, VAL_IMAGES
from reading import NAME

import imagenet_train as script
from imagenet_train import IGNORE_INDEX, Loader, LoaderConfig, TrainError, read_index, read_tree

BATCH = 4


def labels_of(loader: Loader) -> list[list[int]]:
    """The labels of every batch of an epoch; where a label names an image, its samples."""
    return [labels.tolist() for _, labels in loader]


def train_config(shards: Path | str, **changes) -> LoaderConfig:
    return replace(LoaderConfig(read_index(str(shards), "train"), True, BATCH, 32, shuffle=9, epochs=9), **changes)


# ---------------------------------------------------------------- batches


def test_validation_batches_are_full_and_every_sample_is_in_one_of_them(unique):
    index = read_index(str(unique), "val")
    seen = []
    for rank in range(3):
        loader = Loader(LoaderConfig(index, False, 10, 32, 36, rank=rank, world=3, workers=2))
        batches = list(loader)
        assert len(batches) == len(loader) == 2
        for images, labels in batches:
            assert images.shape == (10, 32, 32, 3) and images.dtype == torch.uint8
            assert labels.shape == (10,) and labels.dtype == torch.int64
        seen += [label for _, labels in batches for label in labels.tolist() if label != IGNORE_INDEX]
    assert sorted(seen) == list(range(VAL_IMAGES))


def test_a_rank_without_samples_makes_as_many_batches_as_the_others(unique):
    index = read_index(str(unique), "val")
    config = LoaderConfig(index, False, 1, 32, 36, world=40)
    numbers = [[label for (label,) in labels_of(Loader(replace(config, rank=rank)))] for rank in range(40)]
    assert {len(labels) for labels in numbers} == {2}
    assert sorted(label for labels in numbers for label in labels if label >= 0) == list(range(VAL_IMAGES))


def test_the_same_seed_repeats_and_another_does_not(unique):
    for workers in (0, 2):
        one, same, other = (labels_of(Loader(train_config(unique, seed=seed, workers=workers))) for seed in (0, 0, 1))
        assert one == same != other


@pytest.mark.parametrize("workers", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("source", ["{}", "pipe:cat {}/%s"])
def test_epochs_follow_each_other_from_the_same_processes(unique, workers, source):
    """Every epoch is what a loader that begins with it makes; the processes stay, and none is started anew."""
    config = train_config(source.format(unique), workers=workers, epochs=3)
    others = {process.pid for process in multiprocessing.active_children()}  # what earlier tests left
    loader, processes = Loader(config), set()
    for epoch in range(3):
        fresh = Loader(config)
        fresh.epoch = epoch
        batches = labels_of(loader)
        assert batches == labels_of(fresh) and [len(batch) for batch in batches] == [BATCH] * (TRAIN_IMAGES // BATCH)
        assert len({label for batch in batches for label in batch}) == TRAIN_IMAGES // BATCH * BATCH
        fresh.batches = None
        processes |= {process.pid for process in multiprocessing.active_children()} - others
    assert len(processes) <= workers * 4  # the loader's own, and those of three fresh ones
    with pytest.raises(StopIteration):
        next(loader.batches)  # nothing is read for epochs that do not come


@pytest.mark.parametrize("workers", [0, 1, 2, 3, 7])
def test_a_loader_resumes_anywhere(unique, workers):
    """From any place in the epoch, the rest of it, and the next one, are the same to the last pixel."""
    config = train_config(unique, workers=workers)
    loader, states = Loader(config), []
    epochs = []
    for _ in range(2):
        epochs.append([])
        for batch in loader:
            epochs[-1].append([part.clone() for part in batch])
            states.append(loader.state_dict())
    for done in (1, 2, 5, 10):
        resumed = Loader(config)
        resumed.load_state_dict(states[done - 1])
        assert (resumed.epoch, resumed.done, len(resumed)) == (0, done, 11)
        for whole in (epochs[0][done:], epochs[1]):
            for (a, b), (c, d) in zip(resumed, whole, strict=True):
                assert torch.equal(a, c) and torch.equal(b, d)
    assert (states[10]["epoch"], states[10]["steps"], states[10]["history"]) == (1, 11, [])


@pytest.mark.parametrize("workers", [1, 2])
def test_a_batch_and_the_one_before_stay_valid(unique, workers):
    """Although their memory is used again: the workers have all the time to make what they may."""
    taken = []
    for images, _ in Loader(train_config(unique, workers=workers)):
        taken.append((images, images.clone()))
        time.sleep(0.1)
        assert all(torch.equal(kept, clone) for kept, clone in taken[-2:])
    assert len(taken) == 11 and len({images.data_ptr() for images, _ in taken}) <= 4 * workers


def test_position_is_the_share_of_the_epoch_that_is_used(unique):
    loader = Loader(train_config(unique))
    places = [loader.position for _ in loader]
    assert places == [(n * BATCH / TRAIN_IMAGES, (n + 1) * BATCH / TRAIN_IMAGES) for n in range(11)]
    next(iter(loader))
    assert loader.position == (1, 1 + BATCH / TRAIN_IMAGES)


def test_iter_has_no_effect_before_the_first_batch(unique):
    loader = Loader(train_config(unique))
    iterators = [iter(loader) for _ in range(3)]
    assert (loader.epoch, loader.done, loader.batches) == (0, 0, None)
    whole = labels_of(Loader(train_config(unique)))
    assert [labels.tolist() for _, labels in iterators[1]] == whole and loader.epoch == 1


def test_processes_are_started_by_spawn_where_there_is_no_fork(unique, monkeypatch):
    config = train_config(unique, workers=1)
    expected = labels_of(Loader(config))
    monkeypatch.setattr(script, "START_METHOD", "spawn")
    assert labels_of(Loader(config)) == expected


def test_a_process_that_does_not_start_is_replaced(unique, tmp_path, monkeypatch, capfd):
    """As one that is forked while another thread holds a lock of Python's."""
    config, start = train_config(unique, workers=2), script.end_with_parent
    expected = labels_of(Loader(config))

    def hang(worker: int, times: int) -> None:
        if worker == 0 and len(list(tmp_path.iterdir())) < times:
            (tmp_path / str(os.getpid())).touch()
            time.sleep(1000)
        start(worker)

    monkeypatch.setattr(script, "START_TIMEOUT", 2)
    monkeypatch.setattr(script, "end_with_parent", partial(hang, times=1))
    assert labels_of(Loader(config)) == expected
    monkeypatch.setattr(script, "end_with_parent", partial(hang, times=9))
    with pytest.raises(TrainError, match="loader processes did not start within 2 s"):
        labels_of(Loader(config))
    hung = [int(path.name) for path in tmp_path.iterdir()]
    assert len(hung) == 4 and not [pid for pid in hung if Path(f"/proc/{pid}").exists()]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("moment", ["decode", "end_with_parent"])  # the latter is the first that it calls
def test_a_worker_that_is_killed_is_one_clear_error(unique, monkeypatch, moment):
    monkeypatch.setattr(script, moment, lambda *args, **kwargs: os.kill(os.getpid(), 9))
    with pytest.raises(TrainError, match="a loader process was killed .* fewer --workers"):
        list(Loader(train_config(unique, workers=2)))


def test_a_fault_of_the_program_in_a_worker_is_not_called_a_killed_process(unique, monkeypatch):
    def fail(*args, **kwargs) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr(script, "decode", fail)
    with pytest.raises(RuntimeError, match="a fault"):
        list(Loader(train_config(unique, workers=2)))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_worker_is_one_line(unique, tmp_path, workers):
    folder = shutil.copytree(unique, tmp_path / "data")
    (folder / "imagenet-train-000002.tar").unlink()
    with pytest.raises(TrainError, match=r"imagenet-train-000002\.tar: No such file") as error:
        list(Loader(train_config(folder, workers=workers)))
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- images that cannot be decoded


@pytest.fixture
def blank(tree, tmp_path) -> Path:
    """Shards of the tree, in which the bytes of 3 training images and of 1 validation image are lost."""
    from conftest import convert

    copy = shutil.copytree(tree, tmp_path / "tree")
    for split, count in (("train", 3), ("val", 1)):
        for path in sorted((copy / split).rglob("*.JPEG"))[5 : 5 + 7 * count : 7]:
            path.write_bytes(b"\xff\xd8\xff" + bytes(500) + b"\xff\xd9")  # looks like a JPEG at both ends
    assert convert(copy, tmp_path / "data", "--maxcount=7", "--block-size=3") == 0
    return tmp_path / "data"


@pytest.mark.parametrize("workers", [0, 2])
def test_undecodable_images_are_rows_that_do_not_count(blank, workers, capsys):
    index = read_index(str(blank), "train")
    loader = Loader(LoaderConfig(index, True, 4, 32, workers=workers, max_bad=3, epochs=9))
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
    with pytest.raises(TrainError, match="3 undecodable images in an epoch, --max-bad=2; last: imagenet-train"):
        list(Loader(LoaderConfig(index, True, 4, 32, workers=workers, max_bad=2)))


def test_a_batch_without_a_good_image_is_an_error(blank):
    with pytest.raises(TrainError, match="none of 1 images of a batch can be decoded: imagenet-train-"):
        list(Loader(LoaderConfig(read_index(str(blank), "train"), True, 1, 32, max_bad=9)))


def test_pickles_are_bytes_like_any_other(tmp_path):
    """WebDataset's decoders would unpickle members with such names."""
    boom = b"cos\nsystem\n(S'touch " + str(tmp_path / "boom").encode() + b"'\ntR."
    with pytest.raises(TrainError):
        index = script.Index("", ["n0"], [], [], [], [])
        sample = {"__key__": "k", "__url__": "s", "cls": b"0", "pyd": boom, "pickle": boom, "jpg": boom}
        script.decode(sample, LoaderConfig(index, True, 1, 32), 0)
    assert not (tmp_path / "boom").exists()


# ---------------------------------------------------------------- resume with other settings


def test_within_an_epoch_another_index_seed_or_order_is_refused(unique, shards, monkeypatch):
    loader = Loader(train_config(unique))
    for _ in zip(range(3), loader):
        pass
    state = loader.state_dict()
    with pytest.raises(TrainError, match="within an epoch of other data or another order .*index .* there"):
        Loader(train_config(shards)).load_state_dict(state)
    with pytest.raises(TrainError, match="seed 0 there, 1 here"):
        Loader(train_config(unique, seed=1)).load_state_dict(state)
    real = script.shuffled
    monkeypatch.setattr(script, "shuffled", lambda samples, *settings: real(dict(reversed(samples.items())), *settings))
    with pytest.raises(TrainError, match="order [0-9a-f]{16} there, [0-9a-f]{16} here"):
        Loader(train_config(unique)).load_state_dict(state)
    monkeypatch.undo()
    end = state | {"history": [], "order": "", "epoch": 3}
    other = Loader(train_config(shards, seed=1))
    other.load_state_dict(end)  # between epochs anything may change
    assert other.epoch == 3 and len(labels_of(other)) == 15


CHANGED = {
    "more workers": {"workers": 3},
    "another batch": {"batch": 3},
    "another buffer": {"shuffle": 0},
    "more ranks": {"world": 3},
    "all": {"world": 2, "batch": 5, "workers": 1, "shuffle": 30},
}


@pytest.mark.parametrize("name", CHANGED)
@pytest.mark.parametrize("source", ["{}", "pipe:cat {}/%s"])
def test_an_epoch_is_resumed_with_other_settings_or_another_kind_of_source(unique, name, source):
    """Each sample at most once in the epoch, over all ranks; what is left is less than a step."""
    before = train_config(unique, workers=2, world=2)
    used, state = [], None
    for rank in range(2):
        loader = Loader(replace(before, rank=rank))
        for _, (_, labels) in zip(range(3), loader):
            used += labels.tolist()
        state = loader.state_dict()
    assert len(used) == 3 * 2 * BATCH
    after = replace(train_config(source.format(unique)), **{"world": 1} | CHANGED[name])
    steps = []
    for rank in range(after.world):
        loader = Loader(replace(after, rank=rank))
        loader.load_state_dict(state)
        loader.load_state_dict(state)  # Lightning may do so twice
        assert loader.done == 3
        batches = labels_of(loader)
        steps.append(len(batches))
        used += [label for batch in batches for label in batch if label != IGNORE_INDEX]
        assert loader.epoch == 1 and loader.done == 0 and len(labels_of(loader)) == after.steps
    assert len(set(steps)) == 1 and max(Counter(used).values()) == 1
    assert TRAIN_IMAGES - len(used) < after.world * after.batch


def test_a_checkpoint_before_the_first_batch_of_the_new_settings(unique):
    """Resumed with other settings, and stopped again before a batch was used."""
    loader = Loader(train_config(unique))
    first = next(iter(loader))[1].tolist()
    resumed = Loader(train_config(unique, batch=3))
    resumed.load_state_dict(loader.state_dict())
    again = Loader(train_config(unique, batch=2))
    again.load_state_dict(resumed.state_dict())
    assert again.done == 1 and len(again.history) == 2
    used = first + sum(labels_of(again), [])
    assert len(used) == len(set(used)) == 4 + 21 * 2


def test_a_rest_that_is_shorter_than_a_global_batch_makes_one_step(unique):
    """47 images, 2 batches of 20 done: 7 are left for two ranks of 20."""
    loader = Loader(train_config(unique, batch=20))
    first = next(iter(loader))[1].tolist()
    state = loader.state_dict()
    rest = []
    for rank in range(2):
        resumed = Loader(train_config(unique, batch=20, world=2, rank=rank))
        resumed.load_state_dict(state)
        assert len(resumed) == 2
        ((images, labels),) = list(resumed)
        rest += [label for label in labels.tolist() if label != IGNORE_INDEX]
        assert labels.tolist()[14:] == [IGNORE_INDEX] * 6 and torch.equal(images[19], images[0])
        assert resumed.position[1] == 1
    assert sorted(first + rest) == list(range(TRAIN_IMAGES))


def test_the_length_is_that_of_lightnings_epoch(unique):
    """A checkpoint at the start of validation: the loader is in the next epoch, Lightning is not."""
    loader = Loader(train_config(unique))
    labels_of(loader)
    resumed = Loader(train_config(unique, batch=2), lightning_epoch=lambda: current)
    resumed.load_state_dict(loader.state_dict())
    current = 0
    assert len(resumed) == 11
    current = 1
    assert len(resumed) == 23


def test_the_resumed_place_is_described(blocks):
    loader = Loader(LoaderConfig(read_index(str(blocks), "train"), True, 5, 32, shuffle=0))
    assert loader.describe_resume() == "resuming at the start of epoch 1"
    for _ in zip(range(3), loader):
        pass
    assert loader.describe_resume().startswith(
        "resuming in epoch 1 after 3 of 12 batches, with 1 ranks x 1 readers x batch 5; "
    )
    index = loader.config.index
    used = script.used_samples(index, 0, 0, loader.history)
    partly = [b for start, b in zip(index.starts, index.blocks) if 0 < sum(used[start : start + b.samples]) < b.samples]
    assert f"{sum(b.length for b in partly) / 1e6:,.1f} MB are read again" in loader.describe_resume()


# ---------------------------------------------------------------- files, and growing crops


@pytest.mark.parametrize("split", ["train", "val"])
def test_files_and_shards_give_the_same_images(tree, blocks, split):
    """Each image decoded, cropped and flipped to the same pixels, with the same label."""
    images = []
    for index in (read_index(str(blocks), split), read_tree(tree, split)):
        config = LoaderConfig(index, split == "train", BATCH, 32, 36, seed=3)
        order, numbers = script.plan_reader(index, config.training, 3, 0, [config.division._replace(batch=1)], 0, 0)
        samples = script.read_samples(order, numbers, config, multiprocessing.Event())
        decoded = {sample["__key__"]: script.decode(sample, config, epoch=5) for sample in samples}
        images.append({key: (pixels.tolist(), label) for key, (pixels, label) in decoded.items()})
    assert len(images[0]) == read_tree(tree, split).total and images[0] == images[1]


def test_an_epoch_of_files_is_each_once_in_another_order_every_time(tree):
    config = LoaderConfig(read_tree(tree, "train"), True, 6, 32, workers=2, epochs=9)
    loader = Loader(config)
    orders = [sum(labels_of(loader), []) for _ in range(2)]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1]) == sorted([*range(10)] * 6)


def test_trees_that_are_not(tree, tmp_path):
    (empty := tmp_path / "empty" / "train").mkdir(parents=True)
    for folder, expected in ((tmp_path / "nowhere", "No such file"), (empty.parent, "find any class folder")):
        with pytest.raises(TrainError, match=f"--imagenet={folder}: .*{expected}"):
            read_tree(folder, "train")
    copy = shutil.copytree(tree, tmp_path / "copy")
    index = read_tree(copy, "train")
    (copy / "train" / index.names[3]).unlink()
    with pytest.raises(TrainError, match=f"{index.names[3]}: No such file or directory"):
        list(Loader(LoaderConfig(index, True, BATCH, 32)))


def test_the_crop_grows_between_half_and_four_fifths():
    sizes = [script.crop_size(epoch, 20, 128, 224) for epoch in range(20)]
    assert sizes == [128] * 12 + [160] * 2 + [192] * 2 + [224] * 4
    assert {script.crop_size(epoch, 7, 224, 224) for epoch in range(7)} == {224}
    assert script.crop_size(0, 1, 128, 160) == 128
    assert all(script.crop_size(epoch, 90, 130, 225) <= 225 for epoch in range(200))
    assert script.crop_size(89, 90, 130, 225) == 225


def test_batches_grow_with_the_epochs_and_validation_does_not(shards):
    train = LoaderConfig(read_index(str(shards), "train"), True, 20, 128, first_size=32, epochs=5, workers=1)
    loader = Loader(train)
    assert [{batch[0].shape[1] for batch in loader} for _ in range(5)] == [{32}, {32}, {32}, {64}, {128}]
    val = Loader(replace(train, index=read_index(str(shards), "val"), training=False, first_size=0, size=48, resize=54))
    assert {batch[0].shape[1] for batch in val} == {48}


def test_names_are_those_of_the_index(blocks):
    """The sample's key is the member's name: the augmentation of an image is a function of it."""
    with tarfile.open(blocks / NAME) as tar:
        names = {name.partition(".")[0] for name in tar.getnames()}
    index = read_index(str(blocks), "train")
    order = [n for n, b in enumerate(index.blocks) for _ in range(b.samples) if index.names[b.shard] == NAME]
    samples = script.read_samples(
        range(index.starts[order[0]], index.starts[order[-1] + 1]), list(dict.fromkeys(order)),
        LoaderConfig(index, True, 1, 32), multiprocessing.Event(),
    )  # fmt: skip
    assert {sample["__key__"] for sample in samples} == names
