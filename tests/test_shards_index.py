"""The index: its blocks tile a shard's data and hold exactly its samples, and other libraries read it."""

import contextlib
import io
import itertools
import json
import random
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from pathlib import Path

import places
import pytest
import torchvision
import webdataset as wds
import wids
from conftest import convert
from packed import write_tar
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_expander

import imagenet_shards as script

pytestmark = pytest.mark.quick


def tar_members(data: bytes) -> list[tuple[str, bytes]]:
    """(name, bytes) of a tar's members, read with Python's tarfile; the trailer may be missing."""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar if member.isfile()]


def check_blocks(shard: Path, entry: dict, block_size: int) -> None:
    """The blocks tile the shard's data; each one alone is a tar of exactly its samples, and its CRC-32 is right."""
    data, members = shard.read_bytes(), []
    end = 0
    for offset, length, samples, crc32 in entry["blocks"]:
        assert offset == end
        end += length
        block = data[offset:end]
        assert zlib.crc32(block) == crc32
        assert len({name.split(".")[0] for name, _ in tar_members(block)}) == samples
        members += tar_members(block)
    assert members == tar_members(data)
    assert data[end:] == bytes(len(data) - end) and len(data) - end >= 1024  # the trailer
    *full, last = (samples for _, _, samples, _ in entry["blocks"])
    assert set(full) <= {block_size} and 1 <= last <= block_size
    assert sum(full) + last == entry["nsamples"]


@pytest.mark.parametrize("block_size", [1, 3, 64])
def test_blocks_tile_the_shard_and_hold_its_samples(tree, tmp_path, block_size):
    assert convert(tree, tmp_path, "--maxcount=25", f"--block-size={block_size}") == 0
    for split in ("train", "val"):
        index = json.loads((tmp_path / f"imagenet-{split}.json").read_text())
        for entry in index["shardlist"]:
            check_blocks(tmp_path / entry["url"], entry, block_size)


def test_full_scale_index_is_small(tmp_path):
    """1,281,167 samples in 147 shards: below 2 MB."""
    rng = random.Random(0)
    entries = []
    for number, samples in enumerate([8716] * 146 + [1_281_167 - 146 * 8716]):
        counts = [64] * (samples // 64) + [samples % 64] * (samples % 64 > 0)
        sizes = [rng.randint(6_500_000, 8_500_000) // 512 * 512 for _ in counts]
        offsets = [0, *itertools.accumulate(sizes)]
        entries.append({
            "url": f"imagenet-train-{number:06d}.tar", "nsamples": samples, "filesize": offsets[-1] + 10240,
            "sha256": f"{rng.getrandbits(256):064x}",
            "blocks": [[o, n, c, rng.getrandbits(32)] for o, n, c in zip(offsets, sizes, counts)],
        })  # fmt: skip
    names = [f"n{number:08d}, great white shark" for number in range(1000)]
    script.write_index(tmp_path, "train", {"classes": names, "class_names": names, "recipe": {}}, entries)
    text = (tmp_path / "imagenet-train.json").read_text()
    assert json.loads(text)["shardlist"] == entries
    assert len(text) < 2e6 and max(map(len, text.splitlines())) < 1e5


def test_wids_reads_the_index(tree, shards):
    dataset = wids.ShardListDataset(str(shards / "imagenet-val.json"), cache_dir=None)
    assert len(dataset) == 30
    assert {int(sample[".cls"]) for sample in map(dataset.__getitem__, range(30))} == set(range(10))


# ---------------------------------------------------------------- other libraries


def test_timm_reads_the_shards(shards):
    timm_data = pytest.importorskip("timm.data")
    found = []
    for split, total in (("train", 60), ("validation", 30)):
        dataset = timm_data.create_dataset(
            "wds/imagenet", root=str(shards), split=split, is_training=False, batch_size=1, input_img_mode="RGB"
        )
        found.append([label for _, label in dataset])
        assert len(found[-1]) == total
    assert set(found[0]) == set(found[1]) == set(range(10))


def test_hugging_face_datasets_reads_the_shards(shards, tmp_path):
    datasets = pytest.importorskip("datasets")
    files = {"train": str(shards / "imagenet-train-*.tar"), "validation": str(shards / "imagenet-val-*.tar")}
    found = datasets.load_dataset("webdataset", data_files=files, cache_dir=str(tmp_path))
    assert {split: len(found[split]) for split in found} == {"train": 60, "validation": 30}
    assert {int(label) for label in found["train"]["cls"]} == set(range(10)) and found["train"][0]["jpg"].width > 0


# ---------------------------------------------------------------- shards that others wrote


def write_others(tree: Path, folder: Path, pattern: str, maxcount: int) -> list[tuple[str, int]]:
    """Shards as webdataset's documentation writes them, with a member more; the (key, label) of each sample."""
    folder.mkdir()
    oracle = torchvision.datasets.ImageFolder(tree / "train")
    found = []
    with wds.ShardWriter(str(folder / pattern), maxcount=maxcount, verbose=0) as shard:  # PAX headers: mtime is a float
        for path, label in random.Random(0).sample(oracle.samples, len(oracle)):
            key, data = Path(path).stem, Path(path).read_bytes()
            extension = "png" if data.startswith(b"\x89PNG") else "jpeg" if label % 2 else "jpg"
            shard.write({"__key__": f"train/{key}", extension: data, "cls": label, "json": {"filename": key}})
            found.append((f"train/{key}", label))
    return found


def image_first(shard: Path) -> None:
    """Order the members as jpg, json, cls, after an entry for the folder, as GNU tar of a folder begins."""
    with tarfile.open(shard) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]
    order = {"cls": 2, "json": 1}
    members.sort(key=lambda pair: (pair[0].name.rsplit(".", 1)[0], order.get(pair[0].name.rsplit(".", 1)[1], 0)))
    with tarfile.open(shard, "w", format=tarfile.GNU_FORMAT) as tar:
        folder = tarfile.TarInfo("./")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for member, data in members:
            tar.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("order", ["as written", "image first"])
@pytest.mark.parametrize("where", ["folder", "command", "nginx"])
def test_an_index_of_shards_that_webdataset_wrote(tree, tmp_path, order, where, capsys):
    names = "imagenet1k-train-{0000..0002}.tar"  # timm's
    expected = write_others(tree, tmp_path / "theirs", "imagenet1k-train-%04d.tar", 25)
    if order == "image first":
        for shard in (tmp_path / "theirs").iterdir():
            image_first(shard)
    flags = ["--splits=train", f"--names={names}", "--block-size=4", f"--index={tmp_path}/index", "--workers=2"]
    with places.nginx(tmp_path / "theirs") if where == "nginx" else contextlib.nullcontext() as url:
        prefix = {"folder": tmp_path / "theirs", "command": f"pipe:cat {tmp_path}/theirs/%s", "nginx": url}[where]
        assert script.main(["--index-only", f"--shards={prefix}", *flags]) == 0
        assert script.main(["--verify", f"--shards={prefix}", f"--index={tmp_path}/index", "--splits=train"]) == 0
    index = json.loads((tmp_path / "index" / "imagenet-train.json").read_text())
    assert [entry["nsamples"] for entry in index["shardlist"]] == [25, 25, 10]
    assert index["classes"] == list("0123456789") and index["recipe"] is None
    found = set()
    for entry in index["shardlist"]:
        check_blocks(tmp_path / "theirs" / entry["url"], entry, 4)
        for offset, length, _, _ in entry["blocks"]:
            with open(tmp_path / "theirs" / entry["url"], "rb") as file:
                file.seek(offset)
                block = tar_members(file.read(length))
            found |= {(name.rsplit(".", 1)[0], int(data)) for name, data in block if name.endswith(".cls")}
    assert found == set(expected)


def test_index_only_finds_the_blocks_that_were_written(blocks, tmp_path, refused):
    """Of shards with an index of the first version, which has no blocks."""
    folder = shutil.copytree(blocks, tmp_path / "data")
    shutil.rmtree(folder / ".finished")
    path, flags = folder / "imagenet-train.json", [f"--shards={folder}", "--splits=train"]
    text = path.read_text()
    path.write_text(text.replace("blocks", "other"))
    assert "imagenet-train.json: expected an index" in refused("--verify", *flags)
    assert script.main(["--index-only", *flags, "--block-size=3"]) == 0
    assert json.loads(path.read_text()) == json.loads(text) | {"recipe": None, "classes": list("0123456789")}
    assert script.main(["--verify", *flags]) == 0


# ---------------------------------------------------------------- labels, classes, names

NAMES = [f"great class {number}" for number in range(10)]
WNIDS = [f"n0000000{number}" for number in range(10)]
CLASSES = {  # the file's bytes → classes and their names
    "\n".join(NAMES): (NAMES, None),
    "\n".join(map(" ".join, zip(WNIDS, NAMES))) + "\n": (WNIDS, NAMES),
    "\ufeff" + "\r\n".join(map(" ".join, zip(WNIDS, NAMES))) + "\r\n\r\n": (WNIDS, NAMES),
    "\ufeff\r\n" + " \r\n".join(NAMES) + "\n\n": (NAMES, None),
}


@pytest.mark.parametrize("text", CLASSES)
def test_classes_from_a_file(tree, tmp_path, text):
    """As editors write it: a byte-order mark, CRLF, blank lines."""
    write_others(tree, tmp_path / "theirs", "x-%d.tar", 100)
    (tmp_path / "names").write_bytes(text.encode())
    flags = ["--splits=train", f"--shards={tmp_path}/theirs", "--names=x-0.tar", f"--classes={tmp_path}/names"]
    assert script.main(["--index-only", *flags]) == 0
    index = json.loads((tmp_path / "theirs" / "imagenet-train.json").read_text())
    assert (index["classes"], index["class_names"]) == CLASSES[text]


@pytest.mark.parametrize("labels, missing", [((1, 2, 3), "1 class, '0' …"), ((0, 1, 4), "2 classes, '2' …")])
def test_classes_without_images_are_a_warning(tmp_path, image, capsys, labels, missing):
    write_tar(tmp_path / "imagenet-train-000000.tar", labelled(image, *labels))
    assert script.main(["--index-only", f"--shards={tmp_path}", "--splits=train"]) == 0
    error = capsys.readouterr().err
    assert f"{tmp_path}: no images of {missing}" in error and error.count("\n") == 1


def test_names_may_be_repeated(tmp_path, image):
    """As a shell makes them of unquoted braces."""
    for number in range(3):
        write_tar(tmp_path / f"x-{number}.tar", labelled(image, number))
    flags = ["--index-only", f"--shards={tmp_path}", "--splits=train"]
    assert script.main([*flags, "--names=x-0.tar", "--names=x-{2..1}.tar"]) == 0
    index = json.loads((tmp_path / "imagenet-train.json").read_text())
    assert [entry["url"] for entry in index["shardlist"]] == ["x-0.tar", "x-2.tar", "x-1.tar"]


# ---------------------------------------------------------------- archives


@pytest.fixture(scope="module")
def image() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 36), "red").save(buffer, "JPEG")
    return buffer.getvalue()


def labelled(image: bytes, *labels: int) -> list[tuple[str, bytes]]:
    return [pair for n, label in enumerate(labels) for pair in ((f"k{n}.cls", b"%d" % label), (f"k{n}.jpg", image))]


def test_members_without_a_key_are_no_part_of_a_sample(tmp_path, image):
    """macOS's tar adds them. They stand where they stand: the blocks are those of all bytes."""
    samples, other = labelled(image, 0, 1, 2, 3), ("._k.jpg", b"\0\5\x16\7")
    members = [member for pair in zip(samples, [other, ("x/README", b"x")] * 4) for member in pair]
    write_tar(tmp_path / "imagenet-train-000000.tar", [other, *members])
    assert script.main(["--index-only", f"--shards={tmp_path}", "--splits=train", "--block-size=3"]) == 0
    index = script.read_index(str(tmp_path), "train")
    opened = script.open_blocks(({"url": "x", "block": n} for n in range(2)), index, 0, 60)
    found = [(s["__key__"], s["cls"], s["jpg"]) for s in group_by_keys(tar_file_expander(opened))]
    assert found == [(f"k{n}", b"%d" % n, image) for n in range(4)]
    assert [block.samples for block in index.blocks] == [3, 1]


def sized(size: int) -> bytes:
    """A tar of one member that claims this size."""
    header = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    header[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(header))[0]
    return bytes(header) + bytes(2048)


def archive(members: list[tuple[str, bytes]], mode: str = "w") -> bytes:
    with tempfile.NamedTemporaryFile() as file:
        write_tar(Path(file.name), members, mode)
        return file.read()


def cut(image: bytes, more: int) -> bytes:
    """A tar that ends so many bytes after its first sample."""
    data = archive(labelled(image, 0, 1))
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return data[: tar.getmembers()[2].offset + more]


def sparse(image: bytes) -> bytes:
    """A tar of a sample whose image claims 3 GB."""
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/a.jpg", "wb") as file:
            file.truncate(3 << 30)
        Path(f"{folder}/a.cls").write_text("0")
        return subprocess.check_output(["tar", "--sparse", "-C", folder, "-c", "a.cls", "a.jpg"])


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1000000000\n"
ARCHIVES = {  # what the message says → the shard's bytes
    "k: cls, jpg; expected": lambda image: archive([("k.cls", b"0"), ("k.jpg", image), ("k.cls", b"1")]),
    "a: jpg, cls; expected": lambda image: archive([("a.jpg", image), ("a.JPG", image), ("a.cls", b"0")]),
    "a: jpg; expected cls": lambda image: archive([("a.jpg", image)]),
    "a: cls, jpg, png; expected": lambda image: archive([("a.cls", b"0"), ("a.jpg", image), ("a.png", image)]),
    r"\x1b[31mred: cls; expected": lambda image: archive([("\x1b[31mred.cls", b"0")]),
    "labels from 0 to 65536; 0 to 65535": lambda image: archive(labelled(image, 0, 65_536)),
    "labels from -1 to": lambda image: archive(labelled(image, -1)),
    "b'tench'": lambda image: archive([("a.cls", b"tench"), ("a.jpg", image)]),
    "begins with b'a.jpg": lambda image: sized(-1),
    "a: cls; expected": sparse,
    r"it begins with b'\x1f\x8b": lambda image: archive(labelled(image, 0), "w:gz"),
    "it begins with b'<html>a page": lambda image: b"<html>a page</html>" * 100,
    "it begins with b'version https://git-lfs.github.com": lambda image: LFS,
    "it begins with b''": lambda image: b"",
    "no end of a tar file after 1 sample; is it truncated": lambda image: cut(image, 0),
    "unexpected end of data": lambda image: cut(image, 1600),
    "not written, because it would be not an index of shards: no samples": lambda image: archive([]),
}


@pytest.mark.parametrize("expected", ARCHIVES)
def test_an_archive_that_cannot_be_trained_from_is_refused(tmp_path, image, refused, expected):
    (tmp_path / "imagenet-train-000000.tar").write_bytes(ARCHIVES[expected](image))
    error = refused("--index-only", f"--shards={tmp_path}", "--splits=train")
    assert expected in error and f"{tmp_path}/imagenet-train" in error
    assert not (tmp_path / "imagenet-train.json").exists()


@pytest.mark.parametrize("flags, expected", [
    (["--names=x-{0..1}.tar"], "x-1.tar: No such file"),
    (["--names={x-0,x-0}.tar"], "a shard twice"),
    (["--names=x-0.tar", "--classes={0}/classes"], "--classes={0}/classes: 9 classes, but a label is 9"),
    (["--names=x-0.tar", "--classes={0}/empty"], "--classes={0}/empty: 0 classes, but a label is 9"),
    (["--names=x-0.tar", "--classes={0}/nowhere"], "{0}/nowhere: No such file"),
    ([], "--shards={0}: no train shards to index; give their file names with --names"),
    (["--shards=http://localhost/", "--names=x-0.tar"], "for shards at a URL a folder with --index"),
    (["--shards=pipe:exit 3; true ", "--names=x-0.tar", "--index={0}", "--retry-for=0"], "exit status 3 after 0 bytes"),
])  # fmt: skip
def test_index_only_refuses(tmp_path, image, refused, flags, expected):
    write_tar(tmp_path / "x-0.tar", labelled(image, 9))
    (tmp_path / "classes").write_text("class\n" * 9)
    (tmp_path / "empty").touch()
    flags = [f"--shards={tmp_path}", *(flag.replace("{0}", str(tmp_path)) for flag in flags)]
    assert expected.replace("{0}", str(tmp_path)) in refused("--index-only", "--splits=train", *flags)
    assert not (tmp_path / "imagenet-train.json").exists()
