"""Trees that people have: ImageNet's in all its forms, and any tree that torchvision.datasets.ImageFolder reads."""

import csv
import json
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torchvision
import webdataset as wds
from conftest import convert
from packed import recipe, samples
from PIL import Image

import imagenet_shards as script


def make_images(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.frombytes("RGB", (20, 20), random.Random(os.fsencode(path)).randbytes(1200)).save(root / path, "JPEG")


def index_of(folder: Path, split: str = "train") -> dict:
    return json.loads((folder / f"imagenet-{split}.json").read_text())


# ---------------------------------------------------------------- other data sets

UNUSUAL = [
    "train/cat/photo (1).jpg", "train/cat/photo (2).jpg", "train/cat/photo_(1).jpg", "train/cat/1.jpg",
    "train/big dog/1.jpg", "train/big dog/photo [1].JPG", "train/big dog/sub folder/1.jpeg", "train/big dog/a.b.c.jpg",
    "train/ünïcode/1.jpg", "train/ünïcode/Käse.jpg", "train/x-1/1.jpg", "train/x/1-1.jpg", "train/\x1b[31mred/\t1.jpg",
    "train/x/" + "long" * 50 + "1.jpg", "train/x/" + "long" * 50 + "2.jpg", "train/not UTF-8 \udcff/\udcfe.jpg",
]  # fmt: skip


def test_any_tree_that_imagefolder_reads(tmp_path):
    """Any names of folders, equal names of files in two classes, links, other files; the keys are safe for a tar."""
    make_images(tmp_path, *UNUSUAL)
    make_images(tmp_path / "elsewhere", "1.jpg")
    (tmp_path / "train/x/linked.jpg").symlink_to(tmp_path / "elsewhere/1.jpg")
    os.mkfifo(tmp_path / "train/x/fifo")
    (tmp_path / "train/x/.DS_Store").write_bytes(b"x")
    assert convert(tmp_path, tmp_path / "out", "--splits=train", "--maxcount=4") == 0
    oracle = torchvision.datasets.ImageFolder(tmp_path / "train")
    found = samples(tmp_path / "out", "train")
    assert sorted((label, data) for _, label, data in found) == sorted(
        (label, Path(path).read_bytes()) for path, label in oracle.samples
    )
    keys = [key for key, _, _ in found]
    assert len(set(keys)) == len(keys) == len(UNUSUAL) + 1 and all(map(script.KEY.fullmatch, keys))
    assert {"cat-photo__1_", "big_dog-photo__1_", "x-linked"} <= set(keys)
    assert index_of(tmp_path / "out")["classes"] == oracle.classes
    shards = sorted(map(str, (tmp_path / "out").glob("*.tar")))
    assert [sample["__key__"] for sample in wds.WebDataset(shards, shardshuffle=False)] == keys


def test_keys_do_not_depend_on_where_the_tree_is(tmp_path):
    make_images(tmp_path / "one", *UNUSUAL)
    shutil.copytree(tmp_path / "one", tmp_path / "another/place")
    plans = [script.make_plan(root, "train", recipe()) for root in (tmp_path / "one", tmp_path / "another/place")]
    assert plans[0].contents == plans[1].contents


# ---------------------------------------------------------------- Kaggle's


def flatten(root: Path) -> dict[str, str]:
    """Move all validation images into val/ itself; file name → wnid."""
    wnids = {path.name: path.parent.name for path in (root / "val").rglob("*.JPEG")}
    for path in list((root / "val").rglob("*.JPEG")):
        path.rename(root / "val" / path.name)
    for folder in [path for path in (root / "val").iterdir() if path.is_dir()]:
        folder.rmdir()
    return wnids


def write_solution(path: Path, wnids: dict[str, str]) -> None:
    """As Kaggle has it: not sorted, with the boxes of all objects."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["ImageId", "PredictionString"])
        for name, wnid in reversed(wnids.items()):
            writer.writerow([Path(name).stem, f"{wnid} 85 1 499 272 {wnid} 1 2 3 4 "])


@pytest.mark.parametrize("labels", ["beside", "above", "named"])
@pytest.mark.parametrize("named", ["", "ILSVRC", "ILSVRC/Data", "ILSVRC/Data/CLS-LOC"])
def test_a_flat_val_gets_torchvisions_labels(copy, shards, tmp_path, labels, named):
    """Whichever folder is named, and with and without train/."""
    kaggle = tmp_path / "kaggle"
    root = kaggle / "ILSVRC/Data/CLS-LOC"
    root.parent.mkdir(parents=True)
    copy.rename(root)
    wnids = flatten(root)
    path = {"beside": root, "above": kaggle, "named": tmp_path}[labels] / "LOC_val_solution.csv"
    write_solution(path, wnids)
    classes = sorted(set(wnids.values()))
    (kaggle / "LOC_synset_mapping.txt").write_text("".join(f"{w} name of, {w}\n" for w in ["n00000001", *classes]))
    flags = ["--splits=val", "--maxcount=7"] + [f"--val-labels={path}"] * (labels == "named")
    for folder in ("out", "without train"):
        assert convert(kaggle / named, tmp_path / folder, *flags) == 0
        assert sorted(samples(tmp_path / folder, "val")) == sorted(samples(shards, "val"))  # with class folders
        index = index_of(tmp_path / folder, "val")
        assert (index["classes"], index["class_names"]) == (classes, [f"name of, {wnid}" for wnid in classes])
        shutil.rmtree(root / "train", ignore_errors=True)


# ---------------------------------------------------------------- splits that differ, warnings


@pytest.mark.parametrize("change", [flatten, lambda root: shutil.rmtree(root / "val"),
                                    lambda root: (root / "val/another class").mkdir()])  # fmt: skip
def test_the_train_split_works_whatever_val_is(copy, shards, tmp_path, change):
    change(copy)
    assert convert(copy, tmp_path / "out", "--splits=train", "--maxcount=7") == 0
    assert samples(tmp_path / "out", "train") == samples(shards, "train")


@pytest.mark.parametrize("folder", [True, False])
def test_val_may_lack_a_class_of_train(tmp_path, capsys, folder):
    make_images(tmp_path, *(f"{split}/{x}/{x}.JPEG" for split, xs in (("train", "abc"), ("val", "ac")) for x in xs))
    make_images(tmp_path, *(f"val/{number}.JPEG" for number in range(3)))
    if folder:
        (tmp_path / "val/b").mkdir()
    assert convert(tmp_path, tmp_path / "out") == 0
    error = capsys.readouterr().err
    assert f"{tmp_path}/val: no images of 1 class, 'b' …" in error
    assert f"{tmp_path}/val: 3 images beside the class folders left out, '0.JPEG' …" in error
    indexes = [index_of(tmp_path / "out", split) for split in ("train", "val")]
    assert indexes[0]["classes"] == indexes[1]["classes"] == ["a", "b", "c"]
    assert {label for _, label, _ in samples(tmp_path / "out", "val")} == {0, 2}


def test_the_standard_classes_and_their_names():
    """timm has the wnids in label order; its names agree with torchvision's."""
    info = pytest.importorskip("timm.data").ImageNetInfo("imagenet-1k")
    wnids = info.label_names()
    assert script.is_imagenet(wnids) and not script.is_imagenet(wnids[1:]) and not script.is_imagenet(wnids[::-1])
    names = script.find_class_names(None, wnids)
    assert names[:2] == ["tench", "goldfish"] and len(names) == 1000
    descriptions = map(info.label_name_to_description, wnids)
    assert [name for name, text in zip(names, descriptions) if name.split()[0] not in text] == []


def test_other_totals_than_imagenets_are_a_warning(tree, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script, "is_imagenet", lambda classes: len(classes) == 10)
    monkeypatch.setattr(script, "find_class_names", lambda root, classes: None)
    assert convert(tree, tmp_path, "--maxcount=70") == 0
    train, val = capsys.readouterr().err.splitlines()
    assert f"{tree}/train: 60 images, ImageNet has 1,281,167;" in train and f"{tree}/val: 30 images" in val
    monkeypatch.setattr(script, "IMAGENET_IMAGES", {"train": 60, "val": 30})
    assert convert(tree, tmp_path, "--maxcount=70") == 0 and capsys.readouterr().err == ""


# ---------------------------------------------------------------- trees that are refused


def first(root: Path, split: str = "train") -> Path:
    return sorted((root / split).rglob("*.JPEG"))[0]


def flat(change=lambda wnids: None) -> object:
    """A flat val/, whose labels, if any, are changed."""
    return lambda root: (labels := change(flatten(root))) and write_solution(root / "LOC_val_solution.csv", labels)


def beside(make, split: str = "train") -> object:
    """Another entry beside the first image."""
    return lambda root: make(first(root, split).with_name("0.JPEG"))


def large(root: Path, *sizes: int) -> None:
    """Add files of these sizes, which take no room on the disk."""
    for number, size in enumerate(sizes):
        path = first(root).with_name(f"large{number}.JPEG")
        path.write_bytes(b"\xff\xd8\xff")
        os.truncate(path, size)


TREES = {
    "no such folder; --imagenet must name": lambda root: shutil.rmtree(root / "val"),
    "'ILSVRC2012_img_train.tar'; unpack": lambda root: (root / "train/ILSVRC2012_img_train.tar").touch(),
    "no images in any class folder; expected": lambda root: [shutil.rmtree(root / "train"), (root / "train").mkdir()],
    "no images in class folder 'n99999999'": lambda root: [(root / s / "n99999999").mkdir() for s in ("train", "val")],
    "no class folders; expected a folder per class, or Kaggle's LOC_val_solution.csv (--val-labels)": flat(),
    "LOC_val_solution.csv: no label of 'ILSVRC2012_val_": flat(lambda wnids: dict(list(wnids.items())[1:])),
    "'n99999999' is not in train/": flat(lambda wnids: wnids | {next(iter(wnids)): "n99999999"}),
    "class 'n99999999' is not in train/": lambda root: make_images(root, "val/n99999999/1.jpg"),
    r"'Ka\u0308se' is not in": lambda root: make_images(root, "train/K\xe4se/1.jpg", "val/Ka\u0308se/1.jpg"),
    "not a regular file; remove it": beside(lambda path: path.symlink_to("nowhere")),
    "0.JPEG: not a regular file; remove it": beside(os.mkfifo),
    "val/n02128385/0.JPEG: not a regular file": beside(os.mkfifo, "val"),
    "0.JPEG: not a regular file": beside(lambda path: path.symlink_to("/dev/zero")),
    "--block-size=64: a block of 1.7 GB, readers accept 1.1 GB": lambda root: large(root, *[60_000_000] * 40),
    "is listed already; remove the link": beside(lambda path: path.with_name("x").symlink_to("..")),
    "is listed already": beside(lambda path: path.with_name("x").symlink_to(".")),
}  # fmt: skip


@pytest.mark.parametrize("expected", TREES)
def test_a_tree_that_cannot_be_converted_is_one_line(copy, tmp_path, refused, expected):
    TREES[expected](copy)
    error = refused(f"--imagenet={copy}", f"--shards={tmp_path}/out", "--maxsize=1e11")
    assert expected in error.replace(r"\\", "\\") and (str(copy) in error or "--block-size" in error)
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_too_large_for_an_image_is_not_read(copy, tmp_path, refused):
    large(copy, script.LIMIT + 1, 1 << 40)
    flags = [f"--imagenet={copy}", f"--shards={tmp_path}/out", "--splits=train", "--maxcount=100"]
    first, second, last = refused(*flags, lines=3).splitlines()
    assert "large0.JPEG: 67.1 MB; 67.1 MB are allowed" in first and "large1.JPEG: 1099.5 GB" in second
    assert "2 invalid images" in last


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_too_many_pixels_are_an_invalid_image(copy, tmp_path, refused, kind):
    """108 million, of which Pillow only warns."""
    Image.new("L" if kind == "JPEG" else "1", (10_400, 10_400)).save(first(copy), kind)
    error = refused(f"--imagenet={copy}", f"--shards={tmp_path}/out", "--splits=train", lines=2)
    assert f"{first(copy)}: " in error and "108160000 pixels" in error and "1 invalid image," in error


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """A folder that everybody may write to, and a process to which permissions apply."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        try:
            os.geteuid() or os.seteuid(65534)
            yield Path(name)
        finally:
            os.getuid() or os.seteuid(0)


@pytest.mark.parametrize("path", ["tree/train/a/sub", "tree/train/a/2.jpg", "tree/train", "out"])
def test_what_may_not_be_read_or_written_is_named(unprivileged, refused, path):
    make_images(unprivileged / "tree", "train/a/1.jpg", "train/a/2.jpg", "train/a/sub/3.jpg")
    (unprivileged / "out").mkdir()
    (unprivileged / path).chmod(0)
    error = refused(f"--imagenet={unprivileged}/tree", f"--shards={unprivileged}/out", "--splits=train")
    assert f"{unprivileged}/{path}" in error and "Permission denied" in error
    (unprivileged / path).chmod(0o700)
