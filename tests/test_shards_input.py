"""What people give to imagenet_shards.py: shards of old versions, command lines, prefixes; and --verify."""

import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import convert
from packed import everything, write_tar
from PIL import Image

import imagenet_shards as script

SCRIPT, DATA = Path(script.__file__), Path(__file__).parent / "data"

# ---------------------------------------------------------------- shards of an old version


@pytest.fixture
def before(tmp_path) -> Path:
    """tree/ and shards/ as made by commit 1960d57, with --maxcount=7 --block-size=3."""
    with tarfile.open(DATA / "shards-v2.tar") as tar:
        tar.extractall(tmp_path, filter="data")
    return tmp_path


FLAGS = ["--maxcount=7", "--block-size=3"]


def test_shards_of_an_old_version_are_verified_and_resumed(before, capsys):
    assert script.main(["--verify", f"--shards={before}/shards", "--decode"]) == 0
    files, records = (everything(before / folder) for folder in ("shards", "shards/.finished"))
    inodes = {path: path.stat().st_ino for path in before.glob("shards/*.tar")}
    lost = before / "shards/imagenet-train-000002.tar"
    lost.unlink()
    assert convert(before / "tree", before / "shards", *FLAGS) == 0
    assert "# train: keeping 3 of 4 shards" in capsys.readouterr().out
    assert all(path.stat().st_ino == inode for path, inode in inodes.items() if path != lost)
    assert everything(before / "shards") == files
    assert convert(before / "tree", before / "new", *FLAGS) == 0
    assert everything(before / "new") == files
    (before / "new/.finished/lock").unlink()
    assert everything(before / "new/.finished") == records


@pytest.mark.parametrize("content", [b"\xff", b"[" * 100_000, b"3", b'{"recipe": 3, "entry": 3}', None])
def test_a_damaged_record_is_not_trusted(before, refused, content):
    """Nor is its shard: it is refused, and kept. Without the shard, both are written anew."""
    files, record = everything(before / "shards"), before / "shards/.finished/imagenet-val-000000.tar.json"
    expected, flags = record.read_bytes(), [f"--imagenet={before}/tree", f"--shards={before}/shards", *FLAGS]
    record.write_bytes(content) if content else record.unlink()
    assert "imagenet-val-000000.tar: of another conversion (no record of it)" in refused(*flags)
    assert everything(before / "shards") == files
    (before / "shards/imagenet-val-000000.tar").unlink()
    assert script.main(flags) == 0
    assert everything(before / "shards") == files and record.read_bytes() == expected


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff", b"{}", b'{"shardlist": 3, "recipe": null}', b""])
def test_a_damaged_index_is_one_line_or_written_anew(before, refused, content):
    files = everything(before / "shards")
    (before / "shards/imagenet-val.json").write_bytes(content)
    for prefix in (before / "shards", f"pipe:cat {before}/shards/"):
        error = refused("--verify", f"--shards={prefix}", "--splits=val", "--retry-for=0")
        assert "imagenet-val.json" in error and "expected an index, found b'" in error
    assert convert(before / "tree", before / "shards", *FLAGS) == 0
    assert everything(before / "shards") == files


# ---------------------------------------------------------------- command lines


@pytest.mark.quick
@pytest.mark.parametrize("flags, expected", [
    ([], "one of the arguments --imagenet --verify --index-only is required"),
    (["/data/imagenet"], "one of the arguments --imagenet --verify --index-only is required"),
    (["--verify", "--index-only"], "not allowed with argument --verify"),
    (["--verify", "--shards="], "argument --shards: the value is empty; is a variable not set?"),
    (["--imagenet="], "argument --imagenet: the value is empty"),
    (["--imagenet=s3://bucket/tree"], "argument --imagenet: s3://bucket/tree is not a path on this machine"),
    (["--index-only", "--index=http://host/x?sig=secret"], "argument --index: http://host/x?... is not a path"),
    (["--index-only", "--index=http:/u:secret@host/x"], "argument --index: http:/host/x is not a path"),
    (["--verify", "--shards=pipe:curl", "-sH", "Authorization: secret", "http://u:secret@h/%s"], "in quotes if they"),
    (["--verify", "--shards=pipe:curl", "-HAuthorization: secret"], "unrecognized arguments: a word without a flag"),
    (["--verify", "/data/shards"], "a word without a flag; give values as --flag=VALUE"),
    (["--verify", "--shar=x"], "unrecognized arguments: --shar"),
    (["--verify", "--retry-for=nan"], "argument --retry-for: 'nan' is not a number of at least 0"),
    (["--verify", "--timeout=inf"], "argument --timeout: 'inf' is not a number of at least 0.1"),
    (["--verify", "--workers=99999"], "argument --workers: '99999' is not a whole number from 1 to 1,024"),
    (["--index-only", "--names=x.tar"], "argument --names: needs --index-only, --splits=train or --splits=val"),
    (["--verify", "--names=x.tar", "--splits=val"], "argument --names: needs --index-only"),
    *((["--index-only", "--splits=val", f"--names={names}"], f"argument --names: {problem}") for names, problem in (
        ("x-{0..3.tar", ""), *((name, "needs --index-only, --splits=train or --splits=val, and names of .tar files")
                              for name in ("x-{0..1}.tar.gz", "a/b.tar", "\udcff.tar")))),
    *((["--imagenet=x", flag], flag.split("=")[0]) for flag in (
        "--splits=test", "--maxsize=0", "--workers=-1", "--maxcount=x", "--image=x", "--workers=0.5", "--seed=x",
        "--resize=0.5", "--resize=0", "--quality=96", "--block-size=65537", "--maxsize=inf", "--part=1/2")),
])  # fmt: skip
def test_a_wrong_command_line_is_one_line(refused, flags, expected):
    error = refused(*flags, status=2)
    assert expected in error and "secret" not in error


PREFIXES = {  # a wrong prefix → what is said when it is verified
    "shards/imagenet-train-{000000..000146}.tar": "no such folder; a URL begins with http:// or the like, a command",
    "s3:/bucket": "no such folder; a URL begins with http://",
    "gsutil cat gs://u:secret@bucket/%s": "Protocol not known",
    "http://[::1/": "imagenet_shards.py makes it",
    "http://host name/": "imagenet_shards.py makes it",
    "nonsense://u:secret@host/x": "Protocol not known: nonsense",
    "http://u:secret@127.0.0.1:1/?sig=secret": "imagenet_shards.py makes it",
    "pipe:TOKEN=secret false ": "pipe:false: exit status 1 after 0 bytes",
    "pipe:TOKEN='a secret' false ": "pipe:false: exit status 1 after 0 bytes",
    "pipe:exit 127; no-such-program secret": "exit status 127",
    "t\udcff": "no such folder",
    "x" * 5000: "no such folder",
    "\0": "embedded null byte",
    "\x1b[31m": r"\x1b[31m/imagenet-train.json: no such file",
}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_wrong_prefix_is_one_line_without_secrets(refused, monkeypatch, tmp_path, prefix):
    monkeypatch.chdir(tmp_path)
    error = refused("--verify", f"--shards={prefix}", "--retry-for=0")
    assert PREFIXES[prefix] in error and "secret" not in error
    flags = ["--splits=train", "--names=x-{0..1}.tar", f"--index={tmp_path}", "--retry-for=0"]
    assert "secret" not in refused("--index-only", f"--shards={prefix}", *flags)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("prefix", ["s3://bucket/x", "http://u:secret@host/", "pipe:cat > %s; secret", "./data/%s"])
def test_only_a_folder_is_packed_into(refused, tree, monkeypatch, tmp_path, prefix):
    monkeypatch.chdir(tmp_path)
    error = refused(f"--imagenet={tree}", f"--shards={prefix}")
    assert "not a folder; pack into one" in error and "secret" not in error and not list(tmp_path.iterdir())


def test_closed_stdout(before):
    flags = [SCRIPT, "--verify", f"--shards={before}/shards", "--splits=val"]
    done = subprocess.run(["sh", "-c", 'exec "$0" "$@" >&-', sys.executable, *flags], stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    run = subprocess.Popen([sys.executable, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run.stdout.close()
    assert (run.stderr.read(), run.wait()) == ("imagenet_shards.py: Broken pipe\n", 1)


def test_a_tilde_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/x")
    args = script.parse_args(["--index-only", "--shards=~/shards", "--index=~/index"])
    assert (args.shards, args.index) == ("/home/x/shards", Path("/home/x/index"))


# ---------------------------------------------------------------- --verify


def test_verify_finished_shards(shards, capsys):
    for prefix in (shards, f"{shards}/%s", f"pipe:cat {shards}/", f"pipe:cat {shards}/%s | cat"):
        assert script.main(["--verify", f"--shards={prefix}", "--decode"]) == 0
        assert capsys.readouterr().out.splitlines() == [
            "# train: 9 shards, 60 images: all as the index says", "# val: 5 shards, 30 images: all as the index says",
        ]  # fmt: skip


def flip(at: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:at] + bytes([data[at] ^ 1]) + data[len(data[:at]) + 1 :]


DAMAGE = {
    "cut": lambda data: data[:5000],
    "cut in its trailer": lambda data: data[:-1],
    "empty": lambda data: b"",
    "longer": lambda data: data + bytes(512),
    "blocks exchanged": lambda data: data[2000:] + data[:2000],
    "the first byte": flip(0),
    "a label": flip(512),
    "padding": flip(600),
    "an image": flip(5000),
    "the last byte": flip(-1),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_verify_finds_damage_and_names_the_shard(shards, tmp_path, refused, damage):
    folder = shutil.copytree(shards, tmp_path / "data")
    path = folder / "imagenet-train-000001.tar"
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    for prefix in (folder, f"pipe:cat {folder}/"):
        error = refused("--verify", f"--shards={prefix}", "--retry-for=0", lines=2)
        assert re.search("problem: .*imagenet-train-000001.tar.*\n.* 1 shard with a problem, listed above", error)


@pytest.mark.parametrize("data, expected", [
    (b"", "empty file"), (b"text", "neither JPEG nor PNG"), (b"\xff\xd8\xff" + bytes(9) + b"\xff\xd9", "neither JPEG"),
    ("large", "Image size (108160000 pixels)"), ("cut", "image file is truncated"),
])  # fmt: skip
def test_decode_finds_what_is_no_image(tmp_path, refused, data, expected):
    """Without --decode, which takes long, only changes are found."""
    if isinstance(data, str):
        buffer = io.BytesIO()
        Image.new("L", (10_400, 10_400) if data == "large" else (300, 300)).save(buffer, "JPEG")
        data = buffer.getvalue()[: None if data == "large" else -20]
    write_tar(tmp_path / "imagenet-train-000000.tar", [("a.cls", b"0"), ("a.jpg", data)])
    flags = [f"--shards={tmp_path}", "--splits=train"]
    assert script.main(["--index-only", *flags]) == script.main(["--verify", *flags]) == 0
    assert f"problem: imagenet-train-000000.tar: {expected}" in refused("--verify", *flags, "--decode", lines=2)


def test_verify_of_a_stalled_command_times_out(shards, refused):
    flags = ["--verify", "--timeout=1", "--retry-for=0", "--splits=train"]
    stalled = f"pipe:case %s in *2.tar) head -c 2000 {shards}/%s; sleep 600; esac; cat {shards}/%s"
    assert "problem: imagenet-train-000002.tar from pipe:case: no byte for 1 s" in refused(
        *flags, f"--shards={stalled}", lines=2)


def test_verify_does_not_run_what_an_index_names(shards, tmp_path, refused):
    folder = shutil.copytree(shards, tmp_path / "data")
    index = json.loads((folder / "imagenet-train.json").read_text())
    index["shardlist"][0]["url"] = f"x.tar; touch {tmp_path}/boom"
    (folder / "imagenet-train.json").write_text(json.dumps(index))
    assert "the name 'x.tar; touch" in refused("--verify", f"--shards=pipe:cat {folder}/")
    assert not (tmp_path / "boom").exists()
