"""What people really give to imagenet_shards.py: odd trees, images, indexes, archives and command lines."""

import contextlib
import io
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import convert
from faults import cut, fault_server
from packed import everything, samples
from PIL import Image

import imagenet_shards as script

SCRIPT, DATA = Path(script.__file__), Path(__file__).parent / "data"


@pytest.fixture
def refused(capsys, monkeypatch):
    """Runs main(), which must fail, in a line that is returned, and within the seconds that a user waits."""
    monkeypatch.setattr(sys, "argv", ["imagenet_shards.py"])

    def run(*flags: str, status: int = 1, lines: int = 1) -> str:
        capsys.readouterr()
        begun = time.monotonic()
        try:
            found = script.main(list(flags))
        except SystemExit as stop:
            found = stop.code
        error = capsys.readouterr().err
        assert found == status and error.count("\n") == lines and time.monotonic() - begun < 20, error
        assert all(line.startswith("imagenet_shards.py: ") for line in error.splitlines())
        return error

    return run


def jpeg(path: Path, size: tuple[int, int] = (40, 36), **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = random.Random(path.name).randbytes(size[0] * size[1] * 3)
    Image.frombytes("RGB", size, pixels).save(path, "JPEG", **options)
    return path


def small_tree(root: Path, train: str = "ab", val: str = "ab") -> Path:
    """Two images a class."""
    for split, classes in (("train", train), ("val", val)):
        for name in classes:
            for number in range(2):
                jpeg(root / split / name / f"{split}_{name}{number}.JPEG")
    return root


def write_shard(path: Path, members: list[tuple[str, bytes]], **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, options.pop("mode", "w"), format=tarfile.USTAR_FORMAT, **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> bytes:
    return jpeg(tmp_path_factory.mktemp("image") / "x.jpg").read_bytes()


def labelled(image: bytes, *labels: int, key: str = "k") -> list[tuple[str, bytes]]:
    return [
        member
        for number, label in enumerate(labels)
        for member in ((f"{key}{number}.cls", b"%d" % label), (f"{key}{number}.jpg", image))
    ]


# ---------------------------------------------------------------- shards of the version before


@pytest.fixture
def before(tmp_path) -> Path:
    """tree/ and shards/ as made by commit 1960d57, with --maxcount=7 --block-size=3."""
    with tarfile.open(DATA / "shards-v2.tar") as tar:
        tar.extractall(tmp_path, filter="data")
    return tmp_path


def test_shards_of_the_version_before_are_verified_and_resumed(before, capsys):
    assert script.main(["--verify", f"--shards={before}/shards", "--decode"]) == 0
    files, flags = everything(before / "shards"), ["--maxcount=7", "--block-size=3"]
    inodes = {path: path.stat().st_ino for path in before.glob("shards/*.tar")}
    lost = before / "shards/imagenet-train-000002.tar"
    lost.unlink()
    assert convert(before / "tree", before / "shards", *flags) == 0
    assert "# train: keeping 3 of 4 shards" in capsys.readouterr().out
    assert all(path.stat().st_ino == inode for path, inode in inodes.items() if path != lost)
    assert everything(before / "shards") == files
    assert convert(before / "tree", before / "new", *flags) == 0
    assert everything(before / "new") == files
    assert everything(before / "new/.finished") == everything(before / "shards/.finished")


# ---------------------------------------------------------------- command lines


@pytest.mark.parametrize("flags, expected", [
    (["--index-only", "--names=x-0.tar", "--names=x-1.tar"], "argument --names: given twice; quote a value"),
    (["--verify", "--shards="], "argument --shards: the value is empty; is a variable not set?"),
    (["--imagenet="], "argument --imagenet: the value is empty"),
    (["--imagenet=s3://bucket/tree"], "argument --imagenet: s3://bucket/tree is not a path on this machine"),
    (["--index-only", "--index=http://host/x?sig=secret"], "argument --index: http://host/x?... is not a path"),
    (["--verify", "--shards=pipe:curl", "-sH", "Authorization: secret", "http://u:secret@h/%s"], "in quotes if it"),
    (["--verify", "--shards=pipe:curl", "-HAuthorization: secret"], "unrecognized arguments: -HAuthorization"),
    (["/data/imagenet"], "one of the arguments --imagenet --verify --index-only is required"),
    (["--verify", "/data/shards"], "unrecognized arguments: /data/shards; give a value as --flag=VALUE"),
    (["--verify", "--shar=x"], "unrecognized arguments: --shar"),
    (["--verify", "--retry-for=nan"], "argument --retry-for: 'nan' is not a number of at least 0"),
    (["--verify", "--timeout=inf"], "argument --timeout: 'inf' is not a number of at least 0.1"),
    (["--verify", "--workers=99999"], "argument --workers: '99999' is not a whole number from 1 to 1,024"),
])  # fmt: skip
def test_a_wrong_command_line_is_one_line(refused, flags, expected):
    error = refused(*flags, status=2)
    assert expected in error and "secret" not in error


def test_aliases_of_a_flag_are_one_flag(capsys):
    parser = script.Parser("x")
    parser.add_argument("--shards", "--base")
    assert parser.parse_args(["--base=a"]).shards == parser.parse_args(["--shards=a"]).shards == "a"
    with pytest.raises(SystemExit):
        parser.parse_args(["--shards=a", "--base=b"])
    assert "argument --base: given twice" in capsys.readouterr().err


@pytest.mark.parametrize("prefix, expected", [
    ("shards/imagenet-train-{000000..000146}.tar", "no such folder; give the prefix only: the index lists the shards"),
    ("localhost:8000/", "no such folder; a URL begins with PROTOCOL://"),
    ("s3:/bucket", "no such folder; a URL begins with PROTOCOL://"),
    ("gsutil cat gs://u:secret@bucket/%s", "a command begins with pipe:"),
    ("http://[::1/", "not a valid URL"),
    ("http://host name/", "not a valid URL"),
    ("ftp://u:secret@host/x", "cannot read ftp:// URLs; name a command"),
    ("http://u:secret@127.0.0.1:1/?sig=secret", "Connection refused"),
    ("pipe:TOKEN=secret curl -sfH 'X: secret' http://u:secret@127.0.0.1:1/", "exit status 7"),
    ("pipe:no-such-program secret", "exit status 127"),
    ("t\udcff", "no such folder"),
    ("x" * 5000, "File name too long"),
])  # fmt: skip
def test_a_wrong_prefix_is_one_line_without_secrets(refused, monkeypatch, tmp_path, prefix, expected):
    monkeypatch.chdir(tmp_path)
    error = refused("--verify", f"--shards={prefix}", "--retry-for=0")
    assert expected in error and "secret" not in error
    flags = ["--splits=train", "--names=x-{0..1}.tar", f"--index={tmp_path}", "--retry-for=0"]
    assert "secret" not in refused("--index-only", f"--shards={prefix}", *flags)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("prefix", [
    "s3:/bucket", "s3://bucket/x", "localhost:8000/x", "pipe:cat > %s", "x/{0..9}.tar", "./data/%s",
])  # fmt: skip
def test_nothing_is_packed_into_a_folder_that_was_not_meant(refused, tree, monkeypatch, tmp_path, prefix):
    monkeypatch.chdir(tmp_path)
    assert "not a folder; " in refused(f"--imagenet={tree}", f"--shards={prefix}")
    assert not list(tmp_path.iterdir())


def test_a_folder_whose_name_must_be_quoted_in_a_url(before, refused):
    (before / "shards").rename(before / "dätä x")
    with fault_server(before) as server:
        server.folder = before / "dätä x"
        assert refused("--verify", f"--shards={server.url}dätä x/", "--retry-for=0")
        assert server.requests == ["d%C3%A4t%C3%A4%20x/imagenet-train.json"]


def test_closed_streams(before):
    flags = [SCRIPT, "--verify", f"--shards={before}/shards", "--splits=val"]
    done = subprocess.run(["sh", "-c", 'exec "$0" "$@" >&-', sys.executable, *flags], stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    with subprocess.Popen([sys.executable, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        run.stdout.close()
        error = run.stderr.read()
    assert run.returncode == 1 and error == "imagenet_shards.py: standard output was closed\n"


def test_ctrl_c_during_the_imports_is_silent():
    code = f"import runpy, sys, signal; signal.signal(2, signal.default_int_handler); sys.argv = ['x', '--help']\n" \
        f"class Stop:\n def find_spec(self, name, *args):\n  name == 'numpy' and __import__('os').kill(0, 2)\n" \
        f"sys.meta_path.insert(0, Stop()); runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, start_new_session=True)
    assert done.returncode == -signal.SIGINT and done.stderr == ""


def test_a_tilde_is_expanded_in_every_path(before, monkeypatch):
    monkeypatch.setenv("HOME", str(before))
    shutil.copy(before / "shards/imagenet-val.json", before)
    (before / "classes").write_text("a\nb\nc\n")
    assert script.main(["--verify", "--shards=~/shards", "--index=~/", "--splits=val"]) == 0
    flags = ["--index=~/other", "--classes=~/classes", "--splits=val"]
    assert script.main(["--index-only", "--shards=~/shards", *flags]) == 0
    assert script.main(["--imagenet=~/tree", "--shards=~/again", "--splits=train"]) == 0
    assert (before / "other/imagenet-val.json").exists() and (before / "again/imagenet-train.json").exists()


# ---------------------------------------------------------------- trees


@pytest.mark.parametrize("named", ["", "ILSVRC", "ILSVRC/Data", "ILSVRC/Data/CLS-LOC"])
def test_kaggles_root(tmp_path, named):
    small_tree(tmp_path / "kaggle/ILSVRC/Data/CLS-LOC")
    (tmp_path / "kaggle/LOC_synset_mapping.txt").write_text("a first, one\nb second\n")
    assert convert(tmp_path / "kaggle" / named, tmp_path / "out") == 0
    assert json.loads((tmp_path / "out/imagenet-val.json").read_text())["class_names"] == ["first, one", "second"]


@pytest.mark.parametrize("folder", [True, False])
def test_val_may_lack_a_class_of_train(tmp_path, capsys, folder):
    small_tree(tmp_path, train="abc", val="ac")
    if folder:
        (tmp_path / "val/b").mkdir()
    assert convert(tmp_path, tmp_path / "out") == 0
    assert f"{tmp_path}/val: no images of 1 class of train/, 'b' …" in capsys.readouterr().err
    indexes = [json.loads((tmp_path / f"out/imagenet-{split}.json").read_text()) for split in ("train", "val")]
    assert indexes[0]["classes"] == indexes[1]["classes"] == ["a", "b", "c"]
    assert {label for _, label, _ in samples(tmp_path / "out", "val")} == {0, 2}


def test_images_beside_class_folders_are_counted(tmp_path, capsys):
    small_tree(tmp_path)
    for number in range(3):
        jpeg(tmp_path / "val" / f"ILSVRC2012_val_{number}.JPEG")
    assert convert(tmp_path, tmp_path / "out") == 0
    assert "val: 3 images beside the class folders left out, 'ILSVRC2012_val_0.JPEG' …" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"something else", b""])
def test_an_unrelated_meta_bin_is_ignored(tmp_path, content, refused):
    small_tree(tmp_path / "tree")
    (tmp_path / "meta.bin").write_bytes(content)
    assert convert(tmp_path / "tree", tmp_path / "out") == 0
    torch.save({"another": "file"}, tmp_path / "meta.bin")
    assert convert(tmp_path / "tree", tmp_path / "out2") == 0
    for path in sorted((tmp_path / "tree/val").rglob("*.JPEG")):
        path.rename(tmp_path / "tree/val" / path.name)
    for name in "ab":
        (tmp_path / "tree/val" / name).rmdir()
    assert "meta.bin: not torchvision's" in refused(f"--imagenet={tmp_path}/tree", f"--shards={tmp_path}/out3")


def test_names_that_differ_in_normalisation_are_told_apart(tmp_path, refused):
    names = [unicodedata.normalize(form, "Käse") for form in ("NFC", "NFD")]
    for split, name in zip(("train", "val"), names):
        jpeg(tmp_path / split / name / "1.jpg")
        jpeg(tmp_path / split / "b" / "2.jpg")
    assert r"differ in 1 class (Ka\u0308se)" in refused(f"--imagenet={tmp_path}", f"--shards={tmp_path}/out")


@pytest.mark.parametrize("links", [{"a/x": "../b", "b/y": "../a"}, {"a/x": "."}, {"a/x": "..", "b/x": ".."}])
def test_a_loop_of_links(tmp_path, refused, links):
    small_tree(tmp_path)
    for link, target in links.items():
        (tmp_path / "train" / link).symlink_to(target)
    assert "is listed already; remove the link" in refused(f"--imagenet={tmp_path}", f"--shards={tmp_path}/out")


# ---------------------------------------------------------------- images


def test_16_bits_are_scaled_alike_with_and_without_resize(tmp_path):
    levels = struct.pack("<64H", *[value * 1024 for value in range(64)]) * 64
    Image.frombytes("I;16", (64, 64), levels).save(tmp_path / "x.png")
    data = (tmp_path / "x.png").read_bytes()
    opened = script.to_rgb(script.open_image(io.BytesIO(data)))
    resized = script.to_rgb(script.open_image(io.BytesIO(script.resize_image(data, 32, 95)))).resize((64, 64))
    assert opened.mode == "RGB" and opened.getextrema() == ((0, 252),) * 3
    assert max(abs(a - b) for a, b in zip(opened.tobytes(), resized.tobytes())) < 12


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(mode):
    image = Image.new(mode, (3, 2))
    assert script.to_rgb(image).mode == "RGB" and (script.to_rgb(image) is image) == (mode == "RGB")


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9, 0.999])
def test_an_image_whose_end_is_zeros_is_invalid(tree, share):
    """As a power cut leaves it, or a copy that was allocated first."""
    for path in tree.rglob("*.JPEG"):
        data = path.read_bytes()
        start = int(len(data) * share)
        with pytest.raises(ValueError, match=r"zeros in the place of its end|broken PNG|unrecognized data|truncated"):
            script.validate_image(data[:start] + bytes(len(data) - start))


def test_zeros_after_the_end_do_no_harm(tree):
    for path in tree.rglob("*.JPEG"):
        script.validate_image(path.read_bytes() + bytes(5000))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_too_many_pixels_are_refused_by_every_part(tmp_path, kind, refused):
    """108 million, of which Pillow only warns."""
    small_tree(tmp_path / "tree")
    path = tmp_path / "tree/train/a/large.JPEG"
    Image.new("L" if kind == "JPEG" else "1", (10_400, 10_400)).save(path, kind)
    error = refused(f"--imagenet={tmp_path}/tree", f"--shards={tmp_path}/out", "--splits=train", lines=2)
    assert "large.JPEG: 10400 × 10400 pixels; 89,478,485 are allowed" in error and "1 invalid image," in error
    write_shard(tmp_path / "x/imagenet-train-000000.tar", labelled(path.read_bytes(), 0))
    for decode in ([], ["--decode"]):
        flags = ["--index-only", f"--shards={tmp_path}/x", "--splits=train", *decode]
        assert "k0: 10400 × 10400 pixels" in refused(*flags, lines=2)
    with pytest.raises(ValueError, match="10400 × 10400 pixels"):
        script.open_image(io.BytesIO(path.read_bytes()))


def test_lack_of_memory_is_not_an_invalid_image(tmp_path, refused, monkeypatch):
    small_tree(tmp_path / "tree")

    def fail(image: Image.Image) -> None:
        raise MemoryError

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    error = refused(f"--imagenet={tmp_path}/tree", f"--shards={tmp_path}/out", "--resize=20", "--skip-bad")
    assert "too little memory" in error and "--workers" in error
    assert "not-finished" in (tmp_path / "out/imagenet-train.json").read_text()


def test_pillows_warnings_are_not_printed(tmp_path):
    """Of a palette with transparency, and of invalid EXIF data."""
    small_tree(tmp_path / "tree")
    image = Image.new("P", (64, 64))
    image.putpalette(range(48))
    image.save(tmp_path / "tree/train/a/palette.png", transparency=bytes(range(16)))
    jpeg(tmp_path / "tree/train/a/exif.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x09" + bytes(3))
    flags = [f"--imagenet={tmp_path}/tree", f"--shards={tmp_path}/out", "--resize=32"]
    done = subprocess.run([sys.executable, "-W", "default", SCRIPT, *flags], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# ---------------------------------------------------------------- archives


def test_an_index_of_no_image_is_not_written(tmp_path, image, refused):
    tree = small_tree(tmp_path / "tree")
    for path in tree.rglob("*.JPEG"):
        path.write_bytes(b"x")
    error = refused(f"--imagenet={tree}", f"--shards={tmp_path}/out", "--splits=train", "--skip-bad", lines=5)
    assert "imagenet-train.json: not written, because the index lists no classes, no images" in error
    write_shard(tmp_path / "empty/imagenet-train-000000.tar", [])
    assert "not written" in refused("--index-only", f"--shards={tmp_path}/empty", "--splits=train")
    assert not (tmp_path / "empty/imagenet-train.json").exists()


def sized(size: int) -> bytes:
    """A tar of one member that claims this size."""
    info = tarfile.TarInfo("a.jpg")
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    header[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(header))[0]
    return bytes(header) + bytes(2048)


def longname(size: int) -> bytes:
    return sized(size).replace(b"\x000\0ustar", b"\x00L\0ustar", 1)


ARCHIVES = {
    "k0.jpg: a second jpg of this key": lambda image: write_tar([("k0.jpg", image), ("k0.cls", b"0")] * 2),
    "k.cls: a second cls of this key": lambda image: write_tar([("k.cls", b"0"), ("k.jpg", image), ("k.cls", b"1")]),
    "a.JPG: a second jpg of this key": lambda image: write_tar([("a.jpg", image), ("a.JPG", image), ("a.cls", b"0")]),
    "k0: also in imagenet-train-000000.tar": lambda image: write_tar(labelled(image, 0, 1) + labelled(image, 0)),
    "label b'999999999' is not a number below 65536": lambda image: write_tar(labelled(image, 999_999_999)),
    "label b'-1' is not a number": lambda image: write_tar(labelled(image, -1)),
    "a.jpg: a member of -1": lambda image: sized(-1),
    "a.jpg: a member of -512 bytes": lambda image: sized(-512),
    "a.jpg: a member of 1125899906842624 bytes": lambda image: sized(1 << 50),
    "a.jpg: a member of 67108865 bytes": lambda image: sized((64 << 20) + 1),
    "compressed; unpack it to a plain tar file": lambda image: write_tar(labelled(image, 0), mode="w:gz"),
    "compressed; unpack it to a plain": lambda image: write_tar(labelled(image, 0), mode="w:xz"),
    "compressed; unpack it": lambda image: write_tar(labelled(image, 0), mode="w:bz2"),
    "invalid header": lambda image: b"<html>a page</html>" * 100,
    "empty file": lambda image: b"",
    "not a tar header at byte 0": lambda image: write_tar(labelled(image, 0)).replace(b"ustar", b"xstar"),
}


def write_tar(members: list[tuple[str, bytes]], mode: str = "w") -> bytes:
    with io.BytesIO() as file:
        with tarfile.open(fileobj=file, mode=mode, format=tarfile.USTAR_FORMAT) as tar:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return file.getvalue()


@pytest.mark.parametrize("expected", ARCHIVES)
def test_an_archive_that_cannot_be_trained_from_is_refused(tmp_path, image, refused, expected):
    (tmp_path / "imagenet-train-000000.tar").write_bytes(ARCHIVES[expected](image))
    error = refused("--index-only", f"--shards={tmp_path}", "--splits=train", lines=2)
    assert "problem: imagenet-train-000000.tar: " in error and "1 problem, listed above" in error
    assert not (tmp_path / "imagenet-train.json").exists()


def test_guessed_classes_grow_and_are_the_same_in_both_splits(tmp_path, image):
    def classes(split: str) -> list[str]:
        return json.loads((tmp_path / f"imagenet-{split}.json").read_text())["classes"]

    index = ["--index-only", f"--shards={tmp_path}"]
    write_shard(tmp_path / "imagenet-train-000000.tar", labelled(image, 0, 1))
    write_shard(tmp_path / "imagenet-val-000000.tar", labelled(image, 0))
    assert script.main(index) == 0
    assert classes("train") == classes("val") == ["0", "1"]
    write_shard(tmp_path / "imagenet-train-000001.tar", labelled(image, 4))
    assert script.main([*index, "--splits=train"]) == 0
    assert classes("train") == classes("val") == ["0", "1", "2", "3", "4"]
    (tmp_path / "classes").write_text("a\nb\nc\nd\ne\n")
    assert script.main([*index, "--splits=train", f"--classes={tmp_path}/classes"]) == 0
    assert script.main([*index, "--splits=val"]) == 0  # names that are known are kept, and given to both
    assert classes("train") == classes("val") == list("abcde")


@pytest.mark.parametrize("names, expected", [
    ("x-{0..3.tar", "--names=x-{0..3.tar: "),
    ("x-{0..1}.tar.gz", "--names: 'x-0.tar.gz' is not a file name that ends in .tar"),
    ("{x,x}.tar", "a shard twice"),
    ("\udcff.tar", r"--names: '\udcff.tar' is not a file name"),
])  # fmt: skip
def test_wrong_names(tmp_path, image, refused, names, expected):
    write_shard(tmp_path / "x.tar", labelled(image, 0))
    assert expected in refused("--index-only", f"--shards={tmp_path}", "--splits=train", f"--names={names}")


@pytest.mark.parametrize("content", [b"\xff\xfe\0", b""])
def test_classes_that_are_not_text(tmp_path, image, refused, content):
    write_shard(tmp_path / "imagenet-train-000000.tar", labelled(image, 0))
    (tmp_path / "classes").write_bytes(content)
    flags = ["--index-only", f"--shards={tmp_path}", "--splits=train", f"--classes={tmp_path}/classes"]
    assert f"--classes={tmp_path}/classes: " in refused(*flags)


def test_a_stub_is_not_indexed(before, refused):
    index = before / "shards/imagenet-train.json"
    index.write_text(json.dumps({"__kind__": script.UNFINISHED, "recipe": {}}))
    assert "the conversion is not finished" in refused("--index-only", f"--shards={before}/shards")


# ---------------------------------------------------------------- indexes and records


def without_a_shard(index: dict) -> None:
    del index["shardlist"][1]


def with_a_shard_twice(index: dict) -> None:
    index["shardlist"].append(index["shardlist"][1])


def with_reversed_classes(index: dict) -> None:
    index["classes"].reverse()


@pytest.mark.parametrize("change, expected", [
    (without_a_shard, "lists 3 shards, but 4 were made"),
    (with_a_shard_twice, "a shard twice"),
    (with_reversed_classes, "the classes are not in the order of the labels"),
])  # fmt: skip
def test_verify_refuses_an_index_that_was_changed(before, refused, change, expected):
    path = before / "shards/imagenet-train.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    assert expected in refused("--verify", f"--shards={before}/shards")


@pytest.mark.parametrize("content", [b"\xff", b"[" * 100_000, b"3", b'{"recipe": 3, "entry": 3}', b'{"entry": []}'])
def test_a_damaged_record_is_written_anew(before, content):
    files, record = everything(before / "shards"), before / "shards/.finished/imagenet-val-000000.tar.json"
    expected = record.read_bytes()
    record.write_bytes(content)
    assert convert(before / "tree", before / "shards", "--maxcount=7", "--block-size=3") == 0
    assert everything(before / "shards") == files and record.read_bytes() == expected


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff", b'{"recipe": 3}', b'{"shardlist": 3, "recipe": null}'])
def test_a_damaged_index_is_one_line(before, refused, content):
    flags = [f"--imagenet={before}/tree", f"--shards={before}/shards", "--maxcount=7", "--block-size=3"]
    (before / "shards/imagenet-val.json").write_bytes(content)
    assert "imagenet-val.json was not written by this program" in refused(*flags)
    assert "imagenet-val.json" in refused("--verify", f"--shards={before}/shards", "--splits=val")
    (before / "shards/imagenet-val.json").rename(before / "shards/imagenet-train.json")
    assert convert(before / "tree", before / "other", "--splits=val") == 0
    (before / "shards/imagenet-train.json").rename(before / "other/imagenet-train.json")
    assert script.main(["--index-only", f"--shards={before}/other", "--splits=val"]) == 0


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """For root, to whom permissions do not apply, a file system."""
    if os.system(f"mount --bind '{folder}' '{folder}' && mount -o remount,bind,ro '{folder}'"):
        pytest.skip("needs the right to mount")
    try:
        yield
    finally:
        os.system(f"umount '{folder}'")


def test_a_finished_folder_may_be_read_only(before, capsys):
    with read_only(before / "shards"):
        assert convert(before / "tree", before / "shards", "--maxcount=7", "--block-size=3") == 0
        assert script.main(["--verify", f"--shards={before}/shards"]) == 0
    assert "imagenet-val.json: 2 shards, 12 images, " in capsys.readouterr().out


def test_verify_over_http_with_and_without_ranges(before, capsys):
    """Of a server that breaks off once; one that ignores ranges is read by a command, a shard once."""
    for ranges in (True, False):
        with fault_server(before / "shards", ranges) as server:
            server.faults = {"imagenet-val-000001.tar": [cut(lambda data: 5000)] if ranges else []}
            assert script.main(["--verify", f"--shards={server.url}", "--splits=val", "--workers=1"]) == 0
            assert server.requests.count("imagenet-val-000001.tar") == (2 if ranges else 1)
    assert "the server ignores ranges; files are read from their beginning" in capsys.readouterr().err
