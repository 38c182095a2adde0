"""imagenet_shards.py into commands and buckets, in parts, and with smaller images."""

import io
import json
import random
import shlex
import shutil
import subprocess
from pathlib import Path

import PIL
import places
import pytest
from conftest import convert
from PIL import Image
from sharding import everything, samples, storing

import imagenet_shards

SCRIPT = Path(__file__).parent.parent / "imagenet_shards.py"


def into(tree: Path, command: str, record: Path, *flags: str) -> int:
    """Convert into pipe:COMMAND in this process; its exit status."""
    return convert(tree, f"pipe:{command}", "--maxcount=7", f"--record={record}", "--retries=0", *flags)


@pytest.fixture
def store(tmp_path) -> Path:
    """What stands for a bucket here: a folder that a command writes to, a file at a time, whole or not at all."""
    (tmp_path / "store").mkdir()
    return tmp_path / "store"


# ---------------------------------------------------------------- into a command


def test_a_command_gets_the_same_bytes_and_the_index_last(tree, shards, store, tmp_path, capsys):
    assert into(tree, storing(store), tmp_path) == 0
    assert everything(store) == everything(shards)
    order = Path(f"{store}.order").read_text().split()
    for split in ("train", "val"):
        last = max(place for place, name in enumerate(order) if name.startswith(f"imagenet-{split}-"))
        stub, index = (place for place, name in enumerate(order) if name == f"imagenet-{split}.json")
        assert stub < order.index(f"imagenet-{split}-000000.tar") and index > last
    assert order[-1] == "_info.json"
    assert not list(tmp_path.rglob("imagenet-shards-*/*.tar"))  # nothing but the record stays here
    for flags in ([], ["--overwrite"]):
        capsys.readouterr()
        assert into(tree, storing(store), tmp_path, *flags) == 0 and "writing" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "command", ["cat > {}/%s; exit 3", "head -c 1000 > {}/%s", "echo denied >&2; exit 1; #", "no-such-{}"]
)
def test_a_command_that_fails_is_one_line_and_no_index(tree, store, tmp_path, capsys, command):
    assert into(tree, command.format(shlex.quote(str(store))), tmp_path) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "exit status" in error and "fix it and rerun" in error
    assert "denied" in error or "denied" not in command
    assert not list(tmp_path.glob("imagenet-shards-*/.finished/*.json"))


def test_after_a_failure_the_same_command_keeps_finished_shards(tree, shards, store, tmp_path, capsys):
    quota = tmp_path / "quota"
    limited = f"[ $(ls {shlex.quote(str(store))} | wc -l) -lt $(cat {shlex.quote(str(quota))}) ] && {storing(store)}"
    quota.write_text("6")  # the stub, _info.json and four shards
    assert into(tree, limited, tmp_path, "--workers=1") == 1
    done = {path.name: path.stat().st_mtime_ns for path in store.glob("*.tar")}
    assert len(done) == 4
    quota.write_text("400")
    capsys.readouterr()
    assert into(tree, limited, tmp_path, "--workers=1") == 0
    assert "# train: keeping 4 of 9 shards" in capsys.readouterr().out
    assert everything(store) == everything(shards)
    assert all((store / name).stat().st_mtime_ns == then for name, then in done.items())


def test_a_shard_with_an_invalid_image_is_not_stored(tree, store, tmp_path, capsys):
    bad = shutil.copytree(tree, tmp_path / "imagenet")
    path = sorted((bad / "train").rglob("*.JPEG"))[0]
    path.write_bytes(b"not an image")
    assert into(bad, storing(store), tmp_path) == 1
    assert "1 invalid image," in capsys.readouterr().err
    assert len(list(store.glob("imagenet-train-*.tar"))) == 8
    assert imagenet_shards.UNFINISHED in (store / "imagenet-train.json").read_text()


@pytest.mark.parametrize("tool", ["gsutil", "aws"])
def test_a_real_bucket(tree, tmp_path, monkeypatch, tool):
    """Converted straight into it, then read back, every byte checked, with the tool's other half."""
    commands = {
        "gsutil": ("pipe:gsutil -q cp - gs://bucket/%s", "pipe:gsutil cat gs://bucket/%s"),
        "aws": ("pipe:aws s3 cp - s3://bucket/%s", "pipe:aws s3 cp s3://bucket/%s -"),
    }
    write, read = commands[tool]
    (tmp_path / "seed" / "bucket").mkdir(parents=True)
    with places.gcs(tmp_path / "seed") if tool == "gsutil" else places.s3("bucket") as env:
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        flags = ["--splits=val", "--maxcount=20"]
        assert convert(tree, write, f"--record={tmp_path}", *flags) == 0
        assert convert(tree, tmp_path / "folder", *flags) == 0
        index = subprocess.run(
            read.removeprefix("pipe:").replace("%s", "imagenet-val.json"), shell=True, capture_output=True, check=True
        )
        assert index.stdout == (tmp_path / "folder" / "imagenet-val.json").read_bytes()
        assert imagenet_shards.main(["--verify", f"--shards={read}", "--splits=val", "--workers=2"]) == 0


# ---------------------------------------------------------------- on many machines


def test_parts_in_any_order_make_the_same_shards_and_the_last_writes_the_index(tree, shards, tmp_path, capsys):
    for number in (3, 1, 2):
        assert number == 3 or imagenet_shards.UNFINISHED in (tmp_path / "imagenet-train.json").read_text()
        assert convert(tree, tmp_path, "--maxcount=7", f"--part={number}/3") == 0
        written = capsys.readouterr().out.count("# writing")
        assert written == {1: 3 + 2, 2: 3 + 2, 3: 3 + 1}[number]
    assert everything(tmp_path) == everything(shards)


def test_parts_of_machines_that_share_nothing_are_gathered(tree, shards, tmp_path, capsys):
    gathered = tmp_path / "gathered"
    gathered.mkdir()
    for number in (1, 2):
        machine = tmp_path / str(number)
        assert convert(tree, machine, "--maxcount=7", f"--part={number}/2") == 0
        for path in machine.glob("imagenet-*"):
            path.rename(gathered / path.name)
        capsys.readouterr()
        if number == 1:
            assert imagenet_shards.main(["--index-only", f"--shards={gathered}"]) == 1
            error = capsys.readouterr().err
            assert "4 of 9 train shards missing (first imagenet-train-000001.tar)" in error and error.count("\n") == 1
    assert imagenet_shards.main(["--index-only", f"--shards={gathered}", "--workers=2"]) == 0
    assert everything(gathered) == everything(shards)


def test_parts_into_a_command_share_a_record(tree, shards, store, tmp_path):
    for number in (1, 2):
        assert into(tree, storing(store), tmp_path, f"--part={number}/2") == 0
    assert everything(store) == everything(shards)


def test_a_part_rewrites_only_its_own_shards(tree, shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "data")
    (folder / "imagenet-train-000000.tar").unlink()
    assert convert(tree, folder, "--maxcount=7", "--part=2/2") == 0  # nothing of its own is missing
    assert convert(tree, folder, "--maxcount=7", "--part=1/2") == 0 and everything(folder) == everything(shards)


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--part=0/2"], "--part"),
        (["--part=3/2"], "--part"),
        (["--part=2"], "--part"),
        (["--resize=0"], "--resize"),
        (["--resize=64", "--quality=96"], "--quality"),
    ],
)
def test_bad_flags(tree, tmp_path, capsys, flags, expected):
    with pytest.raises(SystemExit) as stop:
        convert(tree, tmp_path, *flags)
    assert stop.value.code == 2 and f"argument {expected}" in capsys.readouterr().err


@pytest.mark.parametrize("prefix", ["gs://bucket/", "s3://bucket", "http://host/"])
def test_a_url_to_write_to_is_answered_with_the_command(tree, capsys, prefix):
    assert convert(tree, prefix) == 1
    assert "pipe:gsutil cp - gs://bucket/%s" in capsys.readouterr().err


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
