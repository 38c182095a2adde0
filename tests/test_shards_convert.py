"""imagenet_shards.py: every image once, byte for byte, whatever happens on the way."""

import hashlib
import io
import itertools
import json
import os
import random
import re
import shutil
import tarfile
from pathlib import Path

import PIL
import pytest
import torch
import torchvision
import webdataset as wds
from conftest import convert
from packed import everything, recipe, samples
from PIL import Image

import imagenet_shards as script

# ---------------------------------------------------------------- the result


@pytest.mark.quick
@pytest.mark.parametrize("split", ["train", "val"])
def test_every_image_once_with_torchvisions_bytes_and_labels(tree, shards, split):
    oracle = torchvision.datasets.ImageFolder(tree / split)
    expected = {(Path(path).stem, label, Path(path).read_bytes()) for path, label in oracle.samples}
    found = samples(shards, split)
    assert len(found) == len(oracle) and set(found) == expected
    labels = [label for _, label, _ in found]
    assert labels != sorted(labels)  # shuffled over the whole split


def test_the_devkit_changes_only_the_class_names(tree, shards, tmp_path, copy):
    wnids = sorted(entry.name for entry in (tree / "train").iterdir())
    # What torchvision's parse_devkit_archive leaves.
    torch.save(({wnid: (wnid, "two words") for wnid in wnids}, []), copy / "meta.bin")
    assert convert(copy, tmp_path / "out", "--maxcount=7") == 0
    for split in ("train", "val"):
        folders = (tmp_path / "out", shards)
        ours, plain = (json.loads((folder / f"imagenet-{split}.json").read_text()) for folder in folders)
        assert ours.pop("class_names") == [f"{wnid}, two words" for wnid in wnids] and plain.pop("class_names") is None
        assert ours == plain
    oracle = torchvision.datasets.ImageNet(copy, "val")
    assert {(Path(p).stem, label) for p, label in oracle.samples} == {s[:2] for s in samples(shards, "val")}


@pytest.mark.parametrize("split", ["train", "val"])
def test_index(tree, shards, split):
    index = json.loads((shards / f"imagenet-{split}.json").read_text())
    assert index["__kind__"] == "wids-shard-index-v1" and index["wids_version"] == 1
    assert index["classes"] == torchvision.datasets.ImageFolder(tree / split).classes
    assert [entry["url"] for entry in index["shardlist"]] == sorted(p.name for p in shards.glob(f"*-{split}-*.tar"))
    for entry in index["shardlist"]:
        data = (shards / entry["url"]).read_bytes()
        assert entry["filesize"] == len(data) and entry["sha256"] == hashlib.sha256(data).hexdigest()
        assert entry["nsamples"] == len(tarfile.open(shards / entry["url"]).getnames()) / 2


def test_timms_info(shards):
    splits = json.loads((shards / "_info.json").read_text())["splits"]
    assert set(splits) == {"train", "validation"}
    for name, pattern, total in (("train", "*-train-*.tar", 60), ("validation", "*-val-*.tar", 30)):
        info = splits[name]
        assert info["name"] == name and info["num_samples"] == sum(info["shard_lengths"]) == total
        assert info["filenames"] == sorted(path.name for path in shards.glob(pattern))


def test_webdataset_itself_reads_the_shards(shards):
    urls = sorted(map(str, shards.glob("imagenet-train-*.tar")))
    dataset = wds.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("__key__", "jpg", "cls")
    found = [(key, cls, image.mode) for key, image, cls in dataset]
    assert [item[:2] for item in found] == [item[:2] for item in samples(shards, "train")]
    assert {mode for *_, mode in found} == {"RGB"}


def test_plain_ustar_that_is_the_same_at_any_time(shards):
    for shard in shards.glob("*.tar"):
        for member in tarfile.open(shard):
            assert (member.mtime, member.pax_headers, member.type) == (0, {}, tarfile.REGTYPE)
            assert re.fullmatch(r"[\w-]+\.(cls|jpg)", member.name)


def test_stdout_in_webdatasets_tradition(tree, tmp_path, capsys):
    assert convert(tree, tmp_path / "out", "--maxcount=25", "--splits=train") == 0
    lines = capsys.readouterr().out.splitlines()
    names = [f"{tmp_path}/out/imagenet-train-00000{number}.tar" for number in range(3)]
    sizes = [script.format_bytes(Path(name).stat().st_size) for name in names]
    assert sorted(lines[:3]) == [
        f"# writing {names[0]} 25 {sizes[0]} 0",
        f"# writing {names[1]} 25 {sizes[1]} 25",
        f"# writing {names[2]} 10 {sizes[2]} 50",
    ]
    assert lines[-1].startswith(f"# {tmp_path}/out/imagenet-train.json: 3 shards, 60 images, ")


# ---------------------------------------------------------------- the plan


@pytest.mark.parametrize("maxsize, maxcount", [(1e9, 7), (30_000, 100_000), (60_000, 4), (1, 1)])
def test_shards_are_cut_where_shardwriter_cuts_them(tree, tmp_path, maxsize, maxcount):
    plan = script.make_plan(tree, "train", recipe(maxsize=maxsize, maxcount=maxcount))
    with wds.ShardWriter(f"{tmp_path}/%d.tar", maxcount, maxsize, verbose=0) as oracle:
        for image in itertools.chain(*plan.shards):
            oracle.write({"__key__": image.key, "jpg": (tree / image.path).read_bytes(), "cls": image.label})
    for number, images in enumerate(plan.shards):
        names = tarfile.open(tmp_path / f"{number}.tar").getnames()[1::2]
        assert names == [f"{image.key}.jpg" for image in images]
    assert len(list(tmp_path.iterdir())) == len(plan.shards)


def test_imagenet_itself_makes_147_and_7_shards():
    # The official tar files less their padding: 146.9 GB in 1,281,167 and 6.7 GB in 50,000 images.
    for total, count, expected in ((146.9e9, 1_281_167, 147), (6.7e9, 50_000, 7)):
        rng = random.Random(0)
        sizes = [rng.lognormvariate(0, 0.6) for _ in range(count)]
        scale = total / sum(sizes)
        sizes = [int(size * scale) for size in sizes]
        images = [script.Image(f"train/n0/{i}.JPEG", i % 1000, size, f"{i}") for i, size in enumerate(sizes)]
        assert len(script.plan_shards(images, 0, 1e9, 100_000)) == expected


def test_the_seed_decides_the_order(tree):
    orders = [script.make_plan(tree, "train", recipe(seed=seed)).shards[0] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2] and set(orders[0]) == set(orders[2])


# ---------------------------------------------------------------- workers, kills, restarts


def test_same_bytes_for_one_and_three_workers(tree, shards, tmp_path):
    for workers in ("1", "3"):
        assert convert(tree, tmp_path / workers, "--maxcount=7", f"--workers={workers}") == 0
        assert everything(tmp_path / workers) == everything(shards)


def test_a_restart_keeps_finished_shards_and_rewrites_the_rest(tree, shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "data")
    kept, cut, missing = (folder / f"imagenet-train-{number:06d}.tar" for number in range(3))
    before = kept.stat()
    cut.write_bytes(cut.read_bytes()[:-1])
    missing.unlink()
    assert convert(tree, folder, "--maxcount=7") == 0
    assert everything(folder) == everything(shards)
    assert kept.stat().st_ino == before.st_ino and kept.stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("flags", [["--maxcount=7", "--seed=1"], ["--maxcount=7", "--maxsize=40000"], ["--maxcount=8"]])
def test_other_arguments_are_refused_unless_overwrite(tree, shards, tmp_path, capsys, flags):
    folder = shutil.copytree(shards, tmp_path / "data")
    assert convert(tree, folder, *flags) == 1
    error = capsys.readouterr().err
    assert "another recipe" in error and "--overwrite" in error and error.count("\n") == 1
    assert everything(folder) == everything(shards)
    assert convert(tree, folder, *flags, "--overwrite") == 0
    assert convert(tree, tmp_path / "fresh", *flags) == 0
    assert everything(folder) == everything(tmp_path / "fresh")


def test_another_tree_is_refused(tree, shards, tmp_path, copy, capsys):
    folder = shutil.copytree(shards, tmp_path / "data")
    next((copy / "train").rglob("*.JPEG")).unlink()
    assert convert(copy, folder, "--maxcount=7") == 1
    assert "images 60 then, 59 now" in capsys.readouterr().err
    assert everything(folder) == everything(shards)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"shardlist": 3}', b"\xff\xfe", b"null"])
def test_an_unreadable_index_is_refused(tree, shards, tmp_path, capsys, content):
    folder = shutil.copytree(shards, tmp_path / "data")
    (folder / "imagenet-train.json").write_bytes(content)
    assert convert(tree, folder, "--maxcount=7") == 1
    assert "imagenet-train.json" in (error := capsys.readouterr().err) and error.count("\n") == 1
    assert (folder / "imagenet-train.json").read_bytes() == content


def test_shards_without_an_index_are_refused(tree, tmp_path, capsys):
    (tmp_path / "imagenet-train-000000.tar").write_bytes(b"hours of work")
    assert convert(tree, tmp_path) == 1
    assert "1 train shard without an index" in capsys.readouterr().err
    assert (tmp_path / "imagenet-train-000000.tar").read_bytes() == b"hours of work"


# ---------------------------------------------------------------- images that are not


def spoil(copy: Path) -> dict[str, str]:
    """Make three images invalid and append bytes to a fourth, which stays valid; name → the expected problem."""
    paths = sorted((copy / "train").rglob("*.JPEG"))
    paths[10].write_bytes(b"")
    paths[20].write_text("<html>404 not found</html>")
    paths[30].write_bytes(paths[30].read_bytes()[:-2000])
    paths[40].write_bytes(paths[40].read_bytes() + b"trailing bytes, as a camera leaves them" * 100)
    return {paths[10].name: "empty file", paths[20].name: "neither JPEG nor PNG", paths[30].name: "truncated"}


def test_invalid_images_are_an_error_that_names_all_of_them(copy, tmp_path, capsys):
    bad = spoil(copy)
    assert convert(copy, tmp_path / "out", "--maxcount=4") == 1
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 4 and "3 invalid images" in error[-1] and "--skip-bad" in error[-1]
    for name, problem in bad.items():
        assert any(name in line and problem in line for line in error)
    assert script.UNFINISHED in (tmp_path / "out" / "imagenet-train.json").read_text()
    assert not list((tmp_path / "out").rglob("*.tmp*"))


def test_skip_bad_leaves_them_out_and_lists_them(copy, tmp_path, capsys):
    bad = spoil(copy)
    convert(copy, tmp_path / "out", "--maxcount=4")
    inodes = {path.name: path.stat().st_ino for path in (tmp_path / "out").glob("*.tar")}
    assert convert(copy, tmp_path / "out", "--maxcount=4", "--skip-bad") == 0
    assert "3 invalid images skipped" in capsys.readouterr().out
    for name, inode in inodes.items():  # what the first run finished is kept
        assert (tmp_path / "out" / name).stat().st_ino == inode
    index = json.loads((tmp_path / "out" / "imagenet-train.json").read_text())
    assert {Path(path).name for shard in index["shardlist"] for path, _ in shard.get("skipped", [])} == set(bad)
    keys = {key for key, _, _ in samples(tmp_path / "out", "train")}
    assert len(keys) == 57 == sum(shard["nsamples"] for shard in index["shardlist"])
    assert not keys & {Path(name).stem for name in bad}
    assert convert(copy, tmp_path / "out", "--maxcount=4") == 1  # not finished without --skip-bad
    assert "3 invalid images, listed above" in capsys.readouterr().err
    assert convert(copy, tmp_path / "out", "--maxcount=4", "--skip-bad") == 0  # what was skipped is recorded
    assert "writing" not in capsys.readouterr().out


def test_validation_agrees_with_pillow():
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "JPEG")
    data = buffer.getvalue()
    for length in range(len(data) + 1):
        try:
            Image.open(io.BytesIO(data[:length]), formats=["JPEG", "PNG"]).load()
            decodes = True
        except Exception:
            decodes = False
        try:
            script.validate_image(data[:length])
            passes = True
        except ValueError:
            passes = False
        assert passes == decodes


def test_other_files_in_the_tree_are_no_images(copy, tree, shards, tmp_path):
    folder = next((copy / "train").iterdir())
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / "readme.txt").write_bytes(b"x")
    assert convert(copy, tmp_path / "out", "--maxcount=7") == 0
    assert everything(tmp_path / "out") == everything(shards)


def test_a_shards_folder_that_cannot_be_made(tree, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert convert(tree, tmp_path / "file" / "data") == 1
    error = capsys.readouterr().err
    assert f"{tmp_path}/file" in error and error.count("\n") == 1


@pytest.mark.quick
@pytest.mark.parametrize("flag", [
    "--splits=test", "--maxsize=0", "--workers=-1", "--maxcount=x", "--image=x", "--decode", "--workers=0.5",
    "--resize=0.5",
    "--resize=0", "--quality=96", "--block-size=65537", "--maxsize=inf", "--part=1/2", "--record=.", "--retries=1",
])  # fmt: skip
def test_bad_flags(tree, tmp_path, capsys, flag):
    with pytest.raises(SystemExit) as stop:
        convert(tree, tmp_path, flag)
    [line] = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and flag.split("=")[0] in line


# ---------------------------------------------------------------- smaller images


def test_resize_makes_the_same_samples_smaller(tree, shards, tmp_path):
    assert convert(tree, tmp_path, "--maxcount=7", "--resize=32", "--quality=80") == 0
    originals = {path.stem: path for path in tree.rglob("*.*") if path.is_file()}
    for split in ("train", "val"):
        before, after = samples(shards, split), samples(tmp_path, split)
        assert [sample[:2] for sample in before] == [sample[:2] for sample in after]
        counts = [
            [shard["nsamples"] for shard in json.loads((folder / f"imagenet-{split}.json").read_text())["shardlist"]]
            for folder in (shards, tmp_path)
        ]
        assert counts[0] == counts[1]
        for key, _, data in after:
            image, original = Image.open(io.BytesIO(data)), Image.open(originals[key])
            assert image.format == "JPEG" and image.mode in ("RGB", "L") and min(image.size) == 32
            assert abs(image.width / image.height - original.width / original.height) < 0.05
    resize = json.loads((tmp_path / "imagenet-train.json").read_text())["recipe"]["resize"]
    assert resize[:2] == [32, 80] and PIL.__version__ in resize[2]


def test_resize_leaves_small_images_as_they_are(tree, shards, tmp_path):
    assert convert(tree, tmp_path, "--maxcount=7", "--resize=5000") == 0
    assert samples(tmp_path, "val") == samples(shards, "val")


def test_resize_and_not_do_not_mix(tree, shards, tmp_path, capsys):
    folder = shutil.copytree(shards, tmp_path / "data")
    assert convert(tree, folder, "--maxcount=7", "--resize=32") == 1
    assert "resize None then, [32, 90, 'Pillow " in capsys.readouterr().err
    assert everything(folder) == everything(shards)


def test_resize_names_what_it_cannot_decode(tree, tmp_path, capsys):
    copy = shutil.copytree(tree, tmp_path / "imagenet")
    path = random.Random(0).choice(sorted((copy / "train").rglob("*.JPEG")))
    path.write_bytes(b"\xff\xd8\xff" + bytes(100) + b"\xff\xd9")  # its first and last bytes are those of a whole file
    assert convert(copy, tmp_path / "out", "--resize=32") == 1
    assert f"invalid image {path}" in capsys.readouterr().err


# ---------------------------------------------------------------- --verify


def verify(prefix: Path | str, *flags: str) -> int:
    return script.main(["--verify", f"--shards={prefix}", "--workers=2", *flags])


def test_verify_finished_shards(shards, capsys):
    for prefix in (shards, f"{shards}/%s", f"pipe:cat {shards}/", f"pipe:cat {shards}/%s | cat"):
        assert verify(prefix, "--decode") == 0
        out = capsys.readouterr().out
        assert f": 9 shards, 60 images, {script.format_bytes(size_of(shards, 'train'))}: all as the index says" in out
        assert ": 5 shards, 30 images, " in out


def size_of(folder: Path, split: str) -> int:
    return sum(path.stat().st_size for path in folder.glob(f"imagenet-{split}-*.tar"))


def rewrite(path: Path, change) -> None:
    """Write a shard again with changed members, at least as long, and its index so that size and checksum fit."""
    size = path.stat().st_size
    with tarfile.open(path) as tar:
        members = change([(m.name, tar.extractfile(m).read()) for m in tar])
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    os.truncate(path, max(size, path.stat().st_size))
    index = json.loads((path.parent / "imagenet-train.json").read_text())
    for entry in index["shardlist"]:
        if entry["url"] == path.name:
            entry |= {"filesize": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    (path.parent / "imagenet-train.json").write_text(json.dumps(index))


def blank(members: list) -> list:
    """Only the first and last bytes of the first image are left."""
    return [*members[:1], (members[1][0], b"\xff\xd8\xff" + bytes(900) + b"\xff\xd9"), *members[2:]]


FAULTS = {
    "unexpected end of data": lambda path: path.write_bytes(path.read_bytes()[:5000]),
    "no end of a tar file": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x"),
    "no end of a tar file after 6": lambda path: path.write_bytes(damaged_header(path)),
    "sha256 differs": lambda path: path.write_bytes(altered_image(path)),
    "No such file": lambda path: path.unlink(),
    "label b'10' is not a number below 10": lambda path: rewrite(path, lambda m: [(m[0][0], b"10"), *m[1:]]),
    "label b'' is not a number below 10": lambda path: rewrite(path, lambda m: [(m[0][0], b""), *m[1:]]),
    "members cls; expected cls and one of": lambda path: rewrite(path, lambda m: [m[0], *m[2:]]),
    "members jpg; expected cls and one of": lambda path: rewrite(path, lambda m: [*m[1:]]),
    "nsamples differs: 6 found, 7 in": lambda path: rewrite(path, lambda m: m[2:]),
    "blocks differs": lambda path: rewrite(path, lambda m: [*m[2:], *m[:2]]),
    "empty file": lambda path: rewrite(path, lambda m: [m[0], (m[1][0], b""), *m[2:]]),
    "also in imagenet-train-00000": lambda path: rewrite(
        path, lambda m: [(n, d) for n, d in tar_of(path.with_name("imagenet-train-000003.tar"))[:2]] + m[2:]),
    "neither JPEG nor PNG": lambda path: rewrite(path, blank),
}


def altered_image(path: Path) -> bytes:
    """The shard with one other bit in the middle of its first image."""
    with tarfile.open(path) as tar:
        image = tar.getmembers()[1]
    data = bytearray(path.read_bytes())
    data[image.offset_data + image.size // 2] ^= 1
    return bytes(data)


def damaged_header(path: Path) -> bytes:
    """The shard with zeros in the header of its last sample, which Python's tarfile takes for the end."""
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[-2].offset
    data = bytearray(path.read_bytes())
    data[offset : offset + 400] = b"x" * 400
    return bytes(data)


def tar_of(path: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(path) as tar:
        return [(m.name, tar.extractfile(m).read()) for m in tar]


@pytest.mark.parametrize("expected", FAULTS)
def test_verify_finds(shards, tmp_path, capsys, expected):
    folder = shutil.copytree(shards, tmp_path / "data")
    FAULTS[expected](folder / "imagenet-train-000001.tar")
    if expected == "neither JPEG nor PNG":
        assert verify(folder, "--splits=train") == 1  # its first and last bytes are a JPEG's, so only the CRC-32 tells
        assert "blocks differs" in capsys.readouterr().err
    assert verify(folder, "--splits=train", "--decode") == 1
    error = capsys.readouterr().err
    assert re.search(rf"problem: imagenet-train-00000[13]\.tar: .*{re.escape(expected)}", error), error
    assert "Traceback" not in error and "listed above" in error.splitlines()[-1]


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"shardlist": [{}]}', b"<html>", b'{"shardlist": 1}'])
def test_verify_without_an_index(tmp_path, capsys, content):
    (tmp_path / "imagenet-train.json").write_bytes(content)
    for prefix in (tmp_path, tmp_path / "nowhere", f"pipe:cat {tmp_path}/"):
        assert verify(prefix, "--retry-for=0") == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "no such folder" in error if "nowhere" in str(prefix) else "imagenet-train.json" in error


def test_verify_does_not_run_what_an_index_names(shards, tmp_path, capsys):
    folder = shutil.copytree(shards, tmp_path / "data")
    index = json.loads((folder / "imagenet-train.json").read_text())
    index["shardlist"][0]["url"] = f"x.tar; touch {tmp_path}/boom"
    (folder / "imagenet-train.json").write_text(json.dumps(index))
    assert verify(f"pipe:cat {folder}/") == 1
    assert "the index holds an invalid value, 'x.tar; touch" in capsys.readouterr().err
    assert not (tmp_path / "boom").exists()
