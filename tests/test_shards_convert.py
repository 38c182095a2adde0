"""imagenet_shards.py: every image once, byte for byte, by a plan that depends on nothing else."""

import contextlib
import hashlib
import io
import itertools
import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import PIL
import pytest
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
    index = json.loads((shards / f"imagenet-{split}.json").read_text())
    assert index["__kind__"] == "wids-shard-index-v1" and index["wids_version"] == 1
    assert index["classes"] == oracle.classes


@pytest.mark.parametrize("split, timms, total", [("train", "train", 60), ("val", "validation", 30)])
def test_index_and_timms_info(shards, split, timms, total):
    index = json.loads((shards / f"imagenet-{split}.json").read_text())
    info = json.loads((shards / "_info.json").read_text())["splits"]
    names = sorted(path.name for path in shards.glob(f"*-{split}-*.tar"))
    assert [entry["url"] for entry in index["shardlist"]] == names == info[timms]["filenames"]
    for entry in index["shardlist"]:
        data = (shards / entry["url"]).read_bytes()
        assert entry["filesize"] == len(data) and entry["sha256"] == hashlib.sha256(data).hexdigest()
        with tarfile.open(shards / entry["url"]) as tar:  # plain ustar, the same at any time
            members = [(re.sub(r"^[\w-]+", "", m.name), m.mtime, m.pax_headers, m.type) for m in tar]
        assert members == [(f".{name}", 0, {}, tarfile.REGTYPE) for name in ("cls", "jpg")] * entry["nsamples"]
    assert info[timms]["shard_lengths"] == [entry["nsamples"] for entry in index["shardlist"]]
    assert set(info) == {"train", "validation"} and info[timms]["name"] == timms
    assert info[timms]["num_samples"] == sum(info[timms]["shard_lengths"]) == total


def test_webdataset_itself_reads_the_shards(shards):
    urls = sorted(map(str, shards.glob("imagenet-train-*.tar")))
    dataset = wds.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("__key__", "jpg", "cls")
    found = [(key, cls, image.mode) for key, image, cls in dataset]
    assert [item[:2] for item in found] == [item[:2] for item in samples(shards, "train")]
    assert {mode for *_, mode in found} == {"RGB"}


def test_stdout_in_webdatasets_tradition(tree, tmp_path, capsys):
    assert convert(tree, tmp_path / "out", "--maxcount=25", "--splits=train") == 0
    lines = capsys.readouterr().out.splitlines()
    sizes = {path: script.format_bytes(path.stat().st_size) for path in sorted((tmp_path / "out").glob("*.tar"))}
    counts = ((25, 0), (25, 25), (10, 50))
    assert sorted(lines[:3]) == [f"# writing {p} {n} {sizes[p]} {first}" for p, (n, first) in zip(sizes, counts)]
    assert lines[-1].startswith(f"# {tmp_path}/out/imagenet-train.json: 3 shards, 60 images, ")


# ---------------------------------------------------------------- the plan


@pytest.mark.parametrize("maxsize, maxcount", [(1e9, 7), (30_000, 100_000), (60_000, 4), (1, 1)])
def test_shards_are_cut_where_shardwriter_cuts_them(tree, tmp_path, maxsize, maxcount):
    plan = script.make_plan(tree, "train", recipe(maxsize=maxsize, maxcount=maxcount))
    with wds.ShardWriter(f"{tmp_path}/%d.tar", maxcount, maxsize, verbose=0) as oracle:
        for image in itertools.chain(*plan.contents):
            oracle.write({"__key__": image.key, "jpg": (tree / image.path).read_bytes(), "cls": image.label})
    for number, images in enumerate(plan.contents):
        names = tarfile.open(tmp_path / f"{number}.tar").getnames()[1::2]
        assert names == [f"{image.key}.jpg" for image in images]
    assert len(list(tmp_path.iterdir())) == len(plan.contents)


def test_imagenet_itself_makes_147_and_7_shards():
    # The official tar files less their padding: 146.9 GB in 1,281,167 and 6.7 GB in 50,000 images.
    for total, count, expected in ((146.9e9, 1_281_167, 147), (6.7e9, 50_000, 7)):
        rng = random.Random(0)
        sizes = [rng.lognormvariate(0, 0.6) for _ in range(count)]
        scale = total / sum(sizes)
        images = [script.ImageFile(f"{i}.JPEG", i % 1000, int(size * scale), f"{i}") for i, size in enumerate(sizes)]
        assert len(script.plan_shards(images, 0, 1e9, 100_000)) == expected


# ---------------------------------------------------------------- workers, restarts


def test_same_bytes_for_one_and_three_workers(tree, shards, tmp_path):
    for workers in ("1", "3"):
        assert convert(tree, tmp_path / workers, "--maxcount=7", f"--workers={workers}") == 0
        assert everything(tmp_path / workers) == everything(shards)


def stop(*args: object) -> None:
    raise script.UserError("stopped")


def test_a_restart_keeps_finished_shards_and_rewrites_the_rest(tree, shards, tmp_path, monkeypatch):
    """Until then there is no index, which would list a shard that is not complete."""
    folder = shutil.copytree(shards, tmp_path / "data")
    kept, cut, missing = (folder / f"imagenet-train-{number:06d}.tar" for number in range(3))
    before = kept.stat()
    cut.write_bytes(cut.read_bytes()[:-1])
    missing.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(script, "run_jobs", stop)
        assert convert(tree, folder, "--maxcount=7") == 1
    assert {path.name for path in folder.glob("*.json")} == {"imagenet-val.json"}
    assert convert(tree, folder, "--maxcount=7") == 0
    assert everything(folder) == everything(shards)
    assert kept.stat().st_ino == before.st_ino and kept.stat().st_mtime_ns == before.st_mtime_ns


OTHERS = {  # flags of a second run → what it says
    "--seed=1": "seed 0 then, 1 now",
    "--maxsize=40000": "maxsize 1000000000 then, 40000 now",
    "--maxcount=8": "maxcount 7 then, 8 now",
    "--block-size=3": "block_size 64 then, 3 now",
    "--resize=32": "resize None then, [32, 90, 'Pillow ",
}


@pytest.mark.parametrize("flag", OTHERS)
def test_other_arguments_are_refused_unless_overwrite(tree, shards, tmp_path, refused, flag):
    folder = shutil.copytree(shards, tmp_path / "data")
    error = refused(f"--imagenet={tree}", f"--shards={folder}", "--maxcount=7", flag)
    assert OTHERS[flag] in error and "--overwrite" in error
    assert everything(folder) == everything(shards)
    assert convert(tree, folder, "--maxcount=7", flag, "--overwrite") == 0
    assert convert(tree, tmp_path / "fresh", "--maxcount=7", flag) == 0
    assert everything(folder) == everything(tmp_path / "fresh") != everything(shards)
    if "--resize" not in flag:  # the same samples in another order or division
        assert sorted(samples(folder, "train")) == sorted(samples(shards, "train"))


def test_another_tree_or_pillow_is_refused(copy, refused, monkeypatch):
    flags = [f"--imagenet={copy}", f"--shards={copy}/out", "--resize=32", "--splits=val"]
    assert script.main(flags) == 0
    files = everything(copy / "out")
    next((copy / "val").rglob("*.JPEG")).unlink()
    assert "images 30 then, 29 now; tree " in refused(*flags)
    monkeypatch.setattr(PIL, "__version__", "1.2.3")
    assert "of another conversion (resize [32, 90, 'Pillow " in refused(*flags) and everything(copy / "out") == files


@pytest.mark.parametrize("name", ["imagenet-train-000000.tar", "imagenet-train.json"])
@pytest.mark.parametrize("content", [b"hours of work", b"[]", b'{"shardlist": 3}', b"\xff\xfe", b"[" * 100_000])
def test_what_another_program_wrote_is_refused(tree, tmp_path, refused, name, content):
    (tmp_path / name).write_bytes(content)
    error = refused(f"--imagenet={tree}", f"--shards={tmp_path}")
    assert f"{tmp_path}/{name}: of another conversion (no record of it)" in error
    assert (tmp_path / name).read_bytes() == content


# ---------------------------------------------------------------- images that are not


def spoil(copy: Path) -> dict[str, str]:
    """Make three images invalid and append bytes to a fourth, which stays valid; name → the expected problem."""
    paths = sorted((copy / "train").rglob("*.JPEG"))
    paths[10].write_bytes(b"")
    paths[20].write_text("<html>404 not found</html>")
    paths[30].write_bytes(paths[30].read_bytes()[:-2000])
    paths[40].write_bytes(paths[40].read_bytes() + b"trailing bytes, as a camera leaves them" * 100)
    return {paths[10].name: "empty file", paths[20].name: "neither JPEG nor PNG", paths[30].name: "truncated"}


def test_invalid_images_are_an_error_that_names_all_of_them(copy, tree, tmp_path, refused):
    """What the error advises is true: the plan goes by sizes, so that only --overwrite works with mended images."""
    bad, out = spoil(copy), tmp_path / "out"
    flags = [f"--imagenet={copy}", f"--shards={out}", "--maxcount=4", "--workers=2"]
    *lines, last = refused(*flags, lines=4).splitlines()
    assert "3 invalid images" in last and "--skip-bad to leave them out and keep the finished shards" in last
    assert "fix them and use --overwrite" in last
    for name, problem in bad.items():
        assert any(name in line and problem in line for line in lines)
    assert not (out / "imagenet-train.json").exists() and not list(out.rglob("*.tmp*"))
    for path in (copy / "train").rglob("*.JPEG"):
        shutil.copy(tree / path.relative_to(copy), path)
    assert "of another conversion (tree " in refused(*flags)
    assert script.main([*flags, "--overwrite"]) == 0
    assert convert(tree, tmp_path / "fresh", "--maxcount=4") == 0
    assert everything(out) == everything(tmp_path / "fresh")


def test_skip_bad_leaves_them_out_and_lists_them(copy, tmp_path, capsys):
    bad, out = spoil(copy), tmp_path / "out"
    assert convert(copy, out, "--maxcount=4") == 1
    inodes = {path: path.stat().st_ino for path in out.glob("*.tar")}
    assert convert(copy, out, "--maxcount=4", "--skip-bad") == 0
    assert "3 invalid images skipped" in capsys.readouterr().out
    assert inodes and all(path.stat().st_ino == inode for path, inode in inodes.items())  # finished shards are kept
    index = json.loads((out / "imagenet-train.json").read_text())
    assert {Path(path).name for shard in index["shardlist"] for path, _ in shard.get("skipped", [])} == set(bad)
    keys = {key for key, _, _ in samples(out, "train")}
    assert len(keys) == 57 == sum(shard["nsamples"] for shard in index["shardlist"])
    assert not keys & {Path(name).stem for name in bad}
    assert convert(copy, out, "--maxcount=4") == 1  # not finished without --skip-bad
    assert "3 invalid images, listed above" in capsys.readouterr().err
    assert convert(copy, out, "--maxcount=4", "--skip-bad") == 0  # what was skipped is recorded
    assert "writing" not in capsys.readouterr().out


def test_what_was_skipped_is_read_again_without_skip_bad(copy, tmp_path, monkeypatch):
    """An image that is restored: its shard is written anew, even if a run is killed between record and name.

    The shard before has the new one's size, because tar files are rounded up.
    """
    out, path = tmp_path / "out", sorted((copy / "train").rglob("*.JPEG"))[20]
    Image.new("RGB", (8, 8)).save(path)
    assert convert(copy, tmp_path / "fresh", "--maxcount=7") == 0
    original = path.read_bytes()
    path.write_bytes(bytes(len(original)))
    assert convert(copy, out, "--maxcount=7", "--skip-bad") == 0
    before = {path: path.stat() for path in out.glob("*.tar")}
    path.write_bytes(original)
    with monkeypatch.context() as patch:
        patch.setattr(script, "publish", lambda tmp, path: stop() if path.suffix == ".tar" else os.replace(tmp, path))
        assert convert(copy, out, "--maxcount=7") == 1
    assert convert(copy, out, "--maxcount=7") == 0 and everything(out) == everything(tmp_path / "fresh")
    [path] = [path for path, status in before.items() if path.stat().st_ino != status.st_ino]
    assert path.stat().st_size == before[path].st_size


def test_an_image_that_changes_after_it_was_listed_is_named(copy, refused, monkeypatch):
    path = sorted((copy / "val").rglob("*.JPEG"))[5]
    disk_usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: [os.truncate(path, 999), disk_usage(folder)][1])
    assert f"{path}: 999 bytes, but " in refused(f"--imagenet={copy}", f"--shards={copy}/out", "--splits=val")


def test_validation_agrees_with_pillow():
    def fails(check, data: bytes) -> bool:
        with contextlib.suppress(Exception):
            check(data)
            return False
        return True

    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "JPEG")
    for end in range(len(buffer.getvalue()) + 1):
        undecodable = fails(lambda part: Image.open(io.BytesIO(part)).load(), buffer.getvalue()[:end])
        assert fails(script.validate_image, buffer.getvalue()[:end]) == undecodable


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9, 0.999])
def test_an_image_whose_end_is_zeros_is_invalid(tree, share):
    """As a power cut leaves it, or a copy that was allocated first. Zeros after the end do no harm."""
    for path in tree.rglob("*.JPEG"):
        data = path.read_bytes()
        script.validate_image(data + bytes(5000))
        start = int(len(data) * share)
        with pytest.raises(ValueError, match=r"zeros in the place of its end|broken PNG|unrecognized data|truncated"):
            script.validate_image(data[:start] + bytes(len(data) - start))


# ---------------------------------------------------------------- smaller images


def test_resize_makes_the_same_samples_smaller(tree, shards, tmp_path):
    assert convert(tree, tmp_path, "--maxcount=7", "--resize=32", "--quality=80") == 0
    originals = {path.stem: path for path in tree.rglob("*.*") if path.is_file()}
    for split in ("train", "val"):
        before, after = samples(shards, split), samples(tmp_path, split)
        assert [sample[:2] for sample in before] == [sample[:2] for sample in after]
        indexes = [json.loads((folder / f"imagenet-{split}.json").read_text()) for folder in (shards, tmp_path)]
        counts = [[shard["nsamples"] for shard in index["shardlist"]] for index in indexes]
        assert counts[0] == counts[1]
        for key, _, data in after:
            image, original = Image.open(io.BytesIO(data)), Image.open(originals[key])
            assert image.format == "JPEG" and image.mode in ("RGB", "L") and min(image.size) == 32
            assert abs(image.width / image.height - original.width / original.height) < 0.05
    resize = json.loads((tmp_path / "imagenet-train.json").read_text())["recipe"]["resize"]
    assert resize[:2] == [32, 80] and PIL.__version__ in resize[2]
    assert convert(tree, tmp_path, "--maxcount=7", "--resize=5000", "--overwrite") == 0  # smaller ones stay as they are
    assert samples(tmp_path, "val") == samples(shards, "val")


def test_resize_names_what_it_cannot_decode(copy, tmp_path, refused):
    path = random.Random(0).choice(sorted((copy / "train").rglob("*.JPEG")))
    path.write_bytes(b"\xff\xd8\xff" + bytes(100) + b"\xff\xd9")  # its first and last bytes are those of a whole file
    assert f"invalid image {path}" in refused(f"--imagenet={copy}", f"--shards={tmp_path}/out", "--resize=32", lines=2)


def test_every_mode_becomes_rgb_and_16_bits_alike_with_and_without_resize():
    """A gradient does not become white."""
    buffer = io.BytesIO()
    levels = struct.pack("<64H", *[value * 1024 for value in range(64)]) * 64
    Image.frombytes("I;16", (64, 64), levels).save(buffer, "PNG")
    opened = script.to_rgb(script.decode_image(buffer.getvalue()))
    resized = Image.open(io.BytesIO(script.resize_image(buffer.getvalue(), 32, 95)))
    assert opened.mode == "RGB" and opened.getextrema() == ((0, 252),) * 3 and resized.mode == "L"
    enlarged = script.to_rgb(resized).resize((64, 64))
    assert max(abs(a - b) for a, b in zip(opened.tobytes(), enlarged.tobytes())) < 12
    assert {script.to_rgb(Image.new(mode, (3, 2))).mode for mode in ("1", "L", "LA", "P", "RGBA", "CMYK")} == {"RGB"}


def test_pillows_warnings_are_not_printed(copy, tmp_path):
    """Of a palette with transparency, and of invalid EXIF data."""
    folder, image = next((copy / "train").iterdir()), Image.new("P", (64, 64))
    image.putpalette(range(48))
    image.save(folder / "palette.png", transparency=bytes(range(16)))
    Image.new("RGB", (64, 64)).save(folder / "exif.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x09" + bytes(3))
    warn = ["-Wdefault", "-Wignore:This process"]  # Python 3.12 and newer warn of fork() in a process with threads
    run = [sys.executable, *warn, script.__file__, f"--imagenet={copy}", f"--shards={tmp_path}/out"]
    done = subprocess.run([*run, "--resize=32"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
