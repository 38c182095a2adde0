"""The index: its blocks tile a shard's data and hold exactly its samples, and other libraries read it."""

import contextlib
import io
import itertools
import json
import random
import shutil
import tarfile
import zlib
from pathlib import Path

import places
import pytest
import torchvision
import webdataset as wds
import wids
from conftest import convert
from hypothesis import given, settings
from hypothesis import strategies as st

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


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 3000), max_size=20), st.integers(1, 9))
def test_blocks_are_found_again_where_they_were_written(lengths, block_size):
    """A shard's entry is the same when it is written and when it is read; webdataset's writer makes the same file."""
    samples = [{"__key__": str(key), "jpg": bytes(length), "cls": key} for key, length in enumerate(lengths)]
    written, oracle = io.BytesIO(), io.BytesIO()
    stream = script.ShardStream("x.tar", block_size, written)
    writer = wds.ShardWriter("%d", opener=lambda name: stream, mtime=0, verbose=0)
    for sample in samples:
        writer.write(sample)
        stream.ends.append(writer.tarstream.tarstream.offset)
    writer.close()
    entry = stream.entry()
    with wds.TarWriter(oracle, mtime=0) as tar:
        ends = [tar.write(sample) and tar.tarstream.offset for sample in samples]
    assert written.getvalue() == oracle.getvalue()
    read = script.ShardStream("x.tar", block_size, io.BufferedReader(io.BytesIO(oracle.getvalue())))
    for end in ends:  # known only after the next header has been read
        while read.file.tell() < end + 512:
            read.read(10240)
        read.ends.append(end)
        read.take(end)
    while read.read(10240):
        pass
    assert entry == read.entry() and sum(samples for _, _, samples, _ in entry["blocks"]) == len(lengths)


def test_full_scale_index_is_small():
    """1,281,167 samples in 147 shards: below 2 MB."""
    rng = random.Random(0)
    shards = []
    for number, samples in enumerate([8716] * 146 + [1_281_167 - 146 * 8716]):
        sizes = [rng.randint(6_500_000, 8_500_000) // 512 * 512 for _ in range(-(-samples // 64))]
        offsets = [0, *itertools.accumulate(sizes)]
        blocks = [[o, n, 64, rng.getrandbits(32)] for o, n in zip(offsets, sizes)]
        shards.append({
            "url": f"imagenet-train-{number:06d}.tar", "nsamples": samples, "filesize": offsets[-1] + 10240,
            "sha256": f"{rng.getrandbits(256):064x}", "skipped": [], "blocks": blocks,
        })
    classes = [f"n{number:08d}" for number in range(1000)]
    content = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "name": "imagenet-train", "shardlist": shards,
               "classes": classes, "class_names": ["great white shark, white shark"] * 1000, "recipe": {}}
    text = script.format_index(content)
    assert json.loads(text) == content
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


def test_an_index_of_the_previous_version_gets_blocks(shards, tmp_path, capsys):
    folder = shutil.copytree(shards, tmp_path / "data")
    shutil.rmtree(folder / ".finished")
    path = folder / "imagenet-train.json"
    index = json.loads(path.read_text())
    recipe = {"seed": 0, "maxsize": 1000000000, "maxcount": 7, "images": 60, "tree": "x", "resize": None}
    entries = [{key: value for key, value in entry.items() if key != "blocks"} for entry in index["shardlist"]]
    old = index | {"recipe": recipe, "shardlist": [entry | {"skipped": []} for entry in entries]}
    path.write_text(json.dumps(old, indent=1))
    assert script.main(["--verify", f"--shards={folder}", "--splits=train"]) == 1
    error = capsys.readouterr().err
    assert "blocks" in error and "--index-only" in error and error.count("\n") == 1
    assert script.main(["--index-only", f"--shards={folder}", "--splits=train"]) == 0
    assert json.loads(path.read_text()) == index | {"recipe": None}
    assert script.main(["--verify", f"--shards={folder}", "--splits=train"]) == 0


def test_classes_from_a_file(tree, tmp_path):
    write_others(tree, tmp_path / "theirs", "x-%d.tar", 100)
    run = ["--index-only", "--splits=train", f"--shards={tmp_path}/theirs", "--names=x-0.tar"]
    run += [f"--classes={tmp_path}/names"]
    names = [f"great class {number}" for number in range(10)]
    for lines, classes, class_names in (
        (names, names, None),
        ([f"n0000000{n} {name}" for n, name in enumerate(names)], [f"n0000000{n}" for n in range(10)], names),
    ):
        (tmp_path / "names").write_text("\n".join(lines) + "\n")
        assert script.main(run) == 0
        index = json.loads((tmp_path / "theirs" / "imagenet-train.json").read_text())
        assert (index["classes"], index["class_names"]) == (classes, class_names)


OTHERS = {
    "No such file": lambda folder: (folder / "x-1.tar").unlink(),
    "1 of 3 train shards missing (first x-1.tar)": lambda folder: (folder / "x-1.tar").unlink(),
    "is it truncated or damaged?": lambda folder: cut_at_a_sample(folder / "x-1.tar"),
    "unexpected end of data": lambda folder: (folder / "x-1.tar").write_bytes((folder / "x-1.tar").read_bytes()[:9000]),
    "label b'9' is not a number below 9": lambda folder: (folder / "names").write_text("class\n" * 9),
    "expected cls and one of jpg, jpeg, png": lambda folder: drop(folder / "x-1.tar", ".cls"),
    "also in x-1.tar": lambda folder: double(folder / "x-1.tar"),
}


def cut_at_a_sample(shard: Path) -> None:
    """A valid tar without its last sample and trailer."""
    with tarfile.open(shard) as tar:
        end = tar.getmembers()[-3].offset
    shard.write_bytes(shard.read_bytes()[:end])


def drop(shard: Path, suffix: str) -> None:
    members = [(name, data) for name, data in tar_members(shard.read_bytes()) if not name.endswith(suffix)]
    write_tar(shard, members)


def double(shard: Path) -> None:
    members = tar_members(shard.read_bytes())
    write_tar(shard, [*members, *members[:3]])


def write_tar(shard: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(shard, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("expected", OTHERS)
def test_index_only_refuses(tree, tmp_path, capsys, expected):
    folder = tmp_path / "theirs"
    write_others(tree, folder, "x-%d.tar", 25)
    OTHERS[expected](folder)
    prefix = f"pipe:cat {folder}/" if expected == "No such file" else folder
    flags = ["--splits=train", "--names=x-{0..2}.tar", f"--index={tmp_path}", "--retry-for=0"]
    flags += [f"--classes={folder}/names"] if (folder / "names").exists() else []
    assert script.main(["--index-only", f"--shards={prefix}", *flags]) == 1
    error = capsys.readouterr().err
    assert expected in error and "Traceback" not in error
    assert not (tmp_path / "imagenet-train.json").exists()


@pytest.mark.parametrize("flags, expected", [
    (["--names=a/b.tar", "--splits=train"], "'a/b.tar' is not a file name that ends in .tar"),
    (["--shards=http://localhost/", "--splits=train"], "--index-only needs --names and --index"),
])  # fmt: skip
def test_index_only_needs(tmp_path, capsys, flags, expected):
    flags = flags if any("--shards" in flag for flag in flags) else [*flags, f"--shards={tmp_path}"]
    assert script.main(["--index-only", *flags]) == 1
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1
