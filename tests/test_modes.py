"""imagenet_train.py's other ways: from the raw files, and with growing images."""

import shutil
from dataclasses import replace

import pytest
from test_train import BATCH, SMALL

import imagenet_train as script
from imagenet_train import Loader, LoaderConfig, crop_size, read_index, read_tree


def run(*flags: str) -> int:
    """imagenet_train.py in this process; its exit status."""
    return script.main([*SMALL, "--workers=1", *flags])


# ---------------------------------------------------------------- --imagenet


@pytest.mark.parametrize("split", ["train", "val"])
def test_files_and_shards_give_the_same_images(tree, shards, split):
    """Each image decoded, cropped and flipped to the same pixels, with the same label."""
    images = []
    for index, read in ((read_index(str(shards), split), None), (read_tree(tree, split), script.read_files)):
        reader = LoaderConfig(index, split == "train", BATCH, 32, 36, seed=3)
        pieces = script.pieces_of(index.counts, reader.training, 3, 0, 0, 1, 0, 1, 1)
        samples = read(pieces, reader) if read else script.read_pieces(pieces, reader, full=None)
        decoded = {sample["__key__"]: script.decode(sample, reader, epoch=5) for sample in samples}
        images.append({key: (pixels.tolist(), label) for key, (pixels, label) in decoded.items()})
    assert len(images[0]) == read_tree(tree, split).total and images[0] == images[1]


def test_an_epoch_of_files_is_each_once_in_another_order_every_time(tree):
    reader = LoaderConfig(read_tree(tree, "train"), True, 6, 32, workers=2)
    loader = Loader(reader)
    orders = [[label for _, labels in loader for label in labels.tolist()] for _ in range(2)]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1]) == sorted([*range(10)] * 6)
    resumed = Loader(reader)
    resumed.load_state_dict(loader.state_dict() | {"epoch": 1, "done": 4})
    assert [label for _, labels in resumed for label in labels.tolist()] == orders[1][24:]


def test_training_from_files(tree, tmp_path, capsys):
    assert run(f"--imagenet={tree}", f"--output={tmp_path}", "--max-epochs=1") == 0
    out = capsys.readouterr().out
    assert "60 train images in 60 files, 30 val images in 30 files" in out and "validated 30/30 images" in out


def test_trees_that_are_not(tree, tmp_path, capsys):
    copy = shutil.copytree(tree, tmp_path / "copy")
    (empty := tmp_path / "empty" / "train").mkdir(parents=True)
    for folder, expected in ((tmp_path / "nowhere", "No such file"), (empty.parent, "find any class folder")):
        assert run(f"--imagenet={folder}") == 1
        error = capsys.readouterr().err
        assert f"--imagenet={folder}: " in error and expected in error and error.count("\n") == 1
    index = read_tree(copy, "train")
    (copy / "train" / index.names[3]).unlink()
    with pytest.raises(script.TrainError, match=f"{index.names[3]}: No such file or directory"):
        list(Loader(LoaderConfig(index, True, BATCH, 32)))


def test_shards_and_files_at_once_are_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        run("--imagenet=a", "--shards=b")
    assert stop.value.code == 2 and "not allowed with argument" in capsys.readouterr().err


# ---------------------------------------------------------------- --progressive


def test_the_crop_grows_between_half_and_four_fifths():
    sizes = [crop_size(epoch, 20, 128, 224) for epoch in range(20)]
    assert sizes == [128] * 12 + [160] * 2 + [192] * 2 + [224] * 4
    assert {crop_size(epoch, 7, 224, 224) for epoch in range(7)} == {224}
    assert crop_size(0, 1, 128, 160) == 128
    assert all(crop_size(epoch, 90, 130, 225) <= 225 for epoch in range(200)) and crop_size(89, 90, 130, 225) == 225


def test_batches_grow_with_the_epochs_and_validation_does_not(shards):
    train = LoaderConfig(read_index(str(shards), "train"), True, 20, 128, first_size=32, epochs=5, workers=1)
    loader = Loader(train)
    assert [{batch[0].shape[1] for batch in loader} for _ in range(5)] == [{32}, {32}, {32}, {64}, {128}]
    resumed = Loader(train)
    resumed.load_state_dict(loader.state_dict() | {"epoch": 3, "done": 2})
    assert [batch[0].shape for batch in resumed] == [(20, 64, 64, 3)]
    val = Loader(replace(train, index=read_index(str(shards), "val"), training=False, first_size=0, size=48, resize=54))
    assert {batch[0].shape[1] for batch in val} == {48}


def test_training_with_growing_images(shards, tmp_path, capsys):
    assert run(f"--shards={shards}", f"--output={tmp_path}", "--max-epochs=2", "--train-size=64", "--progressive=32") == 0
    assert capsys.readouterr().out.count("validated 30/30 images") == 2
    with pytest.raises(SystemExit):
        run(f"--shards={shards}", "--progressive=64")
    assert "--progressive 64 is more than --train-size 32" in capsys.readouterr().err
