"""Trees that people have: ImageNet's in all its forms, and any tree that torchvision.datasets.ImageFolder reads."""

import csv
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
import torchvision
import webdataset as wds
from conftest import convert
from packed import recipe, samples
from PIL import Image

import imagenet_shards as script


def make_images(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.frombytes("RGB", (20, 20), random.Random(path).randbytes(1200)).save(root / path, "JPEG")


# ---------------------------------------------------------------- other data sets

UNUSUAL = [
    "train/cat/photo (1).jpg", "train/cat/photo (2).jpg", "train/cat/photo_(1).jpg", "train/cat/1.jpg",
    "train/big dog/1.jpg", "train/big dog/photo [1].JPG", "train/big dog/sub folder/1.jpeg", "train/big dog/a.b.c.jpg",
    "train/ünïcode/1.jpg", "train/ünïcode/Käse.jpg", "train/x-1/1.jpg", "train/x/1-1.jpg",
    "train/x/" + "long" * 50 + "1.jpg", "train/x/" + "long" * 50 + "2.jpg",
]  # fmt: skip


def test_any_tree_that_imagefolder_reads(tmp_path):
    """Class folders of any name, equal file names in different classes, spaces, brackets, dots, links, long names."""
    make_images(tmp_path, *UNUSUAL)
    make_images(tmp_path / "elsewhere", "1.jpg")
    (tmp_path / "train/x/linked.jpg").symlink_to(tmp_path / "elsewhere/1.jpg")
    assert convert(tmp_path, tmp_path / "out", "--splits=train", "--maxcount=4") == 0
    oracle = torchvision.datasets.ImageFolder(tmp_path / "train")
    found = samples(tmp_path / "out", "train")
    assert sorted((label, data) for _, label, data in found) == sorted(
        (label, Path(path).read_bytes()) for path, label in oracle.samples
    )
    keys = [key for key, _, _ in found]
    assert len(set(keys)) == len(keys) == len(UNUSUAL) + 1 and all(map(script.KEY.fullmatch, keys))
    assert {"cat-photo__1_", "big_dog-photo__1_", "x-linked"} <= set(keys)
    assert json.loads((tmp_path / "out/imagenet-train.json").read_text())["classes"] == oracle.classes
    shards = sorted(map(str, (tmp_path / "out").glob("*.tar")))
    assert [sample["__key__"] for sample in wds.WebDataset(shards, shardshuffle=False)] == keys


def test_keys_do_not_depend_on_where_the_tree_is(tmp_path):
    make_images(tmp_path / "one", *UNUSUAL)
    shutil.copytree(tmp_path / "one", tmp_path / "another/place")
    plans = [script.make_plan(root, "train", recipe()) for root in (tmp_path / "one", tmp_path / "another/place")]
    assert plans[0].shards == plans[1].shards


def test_imagenets_own_keys_stay_as_they_are(tree, shards):
    assert {key for key, _, _ in samples(shards, "train")} == {path.stem for path in (tree / "train").rglob("*.JPEG")}


# ---------------------------------------------------------------- flat validation images


def flatten(root: Path) -> dict[str, str]:
    """Move all validation images into val/ itself; file name → wnid."""
    wnids = {path.name: path.parent.name for path in (root / "val").rglob("*.JPEG")}
    for path in list((root / "val").rglob("*.JPEG")):
        path.rename(root / "val" / path.name)
    for folder in list((root / "val").iterdir()):
        if folder.is_dir():
            folder.rmdir()
    return wnids


def write_solution(path: Path, wnids: dict[str, str]) -> None:
    """As Kaggle has it: not sorted, with the boxes of all objects."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["ImageId", "PredictionString"])
        for name, wnid in reversed(wnids.items()):
            writer.writerow([Path(name).stem, f"{wnid} 85 1 499 272 {wnid} 1 2 3 4 "])


def write_meta(root: Path, wnids: dict[str, str]) -> None:
    """As torchvision has it: the wnids of the validation images in the order of the file names."""
    names = {wnid: (wnid,) for wnid in sorted(set(wnids.values()))}
    torch.save((names, [wnids[name] for name in sorted(wnids)]), root / "meta.bin")


@pytest.mark.parametrize(
    "labels", ["solution beside", "solution above", "solution named", "meta.bin", "meta.bin named"]
)
@pytest.mark.parametrize("train", [True, False])
def test_a_flat_val_gets_torchvisions_labels(copy, shards, tmp_path, labels, train):  # noqa: F811
    root = tmp_path / "kaggle" / "ILSVRC" / "Data" / "CLS-LOC"
    root.parent.mkdir(parents=True)
    copy.rename(root)
    wnids = flatten(root)
    flags = ["--splits=val", "--maxcount=7"]
    if labels.startswith("solution"):
        places = {"beside": root, "above": tmp_path / "kaggle", "named": tmp_path}
        path = places[labels.split()[1]] / "LOC_val_solution.csv"
        write_solution(path, wnids)
        flags += [f"--val-labels={path}"] if "named" in labels else []
    else:
        write_meta(root, wnids)
        flags += [f"--val-labels={root}/meta.bin"] if "named" in labels else []
    if not train:
        shutil.rmtree(root / "train")
    assert convert(root, tmp_path / "out", *flags) == 0
    assert sorted(samples(tmp_path / "out", "val")) == sorted(samples(shards, "val"))  # of the tree with class folders
    index = json.loads((tmp_path / "out/imagenet-val.json").read_text())
    assert index["classes"] == sorted(set(wnids.values()))


def test_kaggles_class_names(copy, tmp_path):  # noqa: F811
    wnids = sorted(path.name for path in (copy / "train").iterdir())
    lines = [f"{wnid} name of, {wnid}\n" for wnid in ["n00000001", *wnids]]
    (tmp_path / "LOC_synset_mapping.txt").write_text("".join(lines))
    assert convert(copy, tmp_path / "out") == 0
    for split in ("train", "val"):
        index = json.loads((tmp_path / f"out/imagenet-{split}.json").read_text())
        assert index["class_names"] == [f"name of, {wnid}" for wnid in wnids]


def test_the_train_split_works_whatever_val_is(copy, tmp_path):  # noqa: F811
    flatten(copy)
    assert convert(copy, tmp_path / "flat", "--splits=train", "--maxcount=70") == 0
    shutil.rmtree(copy / "val")
    (copy / "val" / "another class").mkdir(parents=True)
    assert convert(copy, tmp_path / "other", "--splits=train", "--maxcount=70") == 0
    shutil.rmtree(copy / "val")
    assert convert(copy, tmp_path / "none", "--splits=train", "--maxcount=70") == 0


# ---------------------------------------------------------------- the 1,000 standard classes


def test_the_standard_classes_and_their_names():
    """timm has the wnids in label order; its names agree with torchvision's."""
    info = pytest.importorskip("timm.data").ImageNetInfo("imagenet-1k")
    wnids = info.label_names()
    assert script.is_imagenet(wnids) and not script.is_imagenet(wnids[1:]) and not script.is_imagenet(wnids[::-1])
    names = script.find_class_names(None, wnids)
    assert names[:2] == ["tench", "goldfish"] and len(names) == 1000
    descriptions = map(info.label_name_to_description, wnids)
    assert [name for name, text in zip(names, descriptions) if name.split()[0] not in text] == []


def test_other_totals_than_imagenets_are_a_warning(tree, shards, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script, "is_imagenet", lambda classes: len(classes) == 10)
    monkeypatch.setattr(script, "find_class_names", lambda root, classes: None)
    assert convert(tree, tmp_path, "--maxcount=70") == 0
    error = capsys.readouterr().err.splitlines()
    assert error == [
        f"imagenet_shards.py: {tree}/train: 60 images, ImageNet has 1,281,167; is the tree complete?",
        f"imagenet_shards.py: {tree}/val: 30 images, ImageNet has 50,000; is the tree complete?",
    ]
    monkeypatch.setattr(script, "IMAGENET_IMAGES", {"train": 60, "val": 30})
    assert convert(tree, tmp_path, "--maxcount=70") == 0 and capsys.readouterr().err == ""


# ---------------------------------------------------------------- trees that are refused


def only_archives(root: Path) -> None:
    shutil.rmtree(root / "train")
    (root / "ILSVRC2012_img_train.tar").touch()


def first(root: Path) -> Path:
    return sorted((root / "train").rglob("*.JPEG"))[0]


def flat_with(labels: str) -> object:
    def change(root: Path) -> None:
        wnids = flatten(root)
        if labels == "other.csv":
            (root / "LOC_val_solution.csv").write_text("a,b\nc\n")
        elif labels == "short.csv":
            write_solution(root / "LOC_val_solution.csv", dict(list(wnids.items())[1:]))
        elif labels == "short.bin":
            write_meta(root, dict(list(wnids.items())[1:]))
        elif labels == "broken.bin":
            (root / "meta.bin").write_bytes(b"nonsense")
        elif labels == "wrong class":
            write_solution(root / "LOC_val_solution.csv", wnids | {next(iter(wnids)): "n99999999"})

    return change


TREES = {
    "no such folder": lambda root: shutil.rmtree(root),
    "no such folder; --imagenet must name": lambda root: shutil.rmtree(root / "val"),
    "unpack ILSVRC2012_img_train.tar with torchvision": only_archives,
    "no class folders; expected one folder per class": lambda root: [
        shutil.rmtree(root / "train"), make_images(root, "train/1.jpg")],
    "no class folders; expected": lambda root: [shutil.rmtree(root / "val"), (root / "val").mkdir()],
    "30 images but no class folders; name Kaggle's LOC_val_solution.csv": flat_with("nothing"),
    "LOC_val_solution.csv: not a label for each image": flat_with("other.csv"),
    "LOC_val_solution.csv: not a label for each": flat_with("short.csv"),
    "meta.bin: not a label for each image": flat_with("short.bin"),
    "meta.bin: not torchvision's meta.bin": flat_with("broken.bin"),
    "train/ and val/ differ in 1 class (n99999999), so": flat_with("wrong class"),
    "2 class archives (first n00000001.tar) among the class folders": lambda root: [
        (root / "train" / f"n0000000{n}.tar").touch() for n in (1, 2)],
    "differ in 1 class (n99999999)": lambda root: make_images(root, "val/n99999999/1.jpg"),
    "no images in this class folder": lambda root: [(root / s / "n99999999").mkdir() for s in ("train", "val")],
    "No such file or directory": lambda root: (first(root).parent / "gone.JPEG").symlink_to(root / "nowhere"),
}  # fmt: skip


@pytest.mark.parametrize("expected", TREES)
def test_a_tree_that_cannot_be_converted_is_one_line(copy, tmp_path, capsys, expected):  # noqa: F811
    TREES[expected](copy)
    assert convert(copy, tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert expected in error and str(copy) in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
