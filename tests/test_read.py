"""Prefix → index → samples: every place that a prefix can name, and what is said when the place is not right."""

import contextlib
import functools
import http.server
import json
import multiprocessing
import os
import shutil
import tarfile
import threading
import time
from pathlib import Path

import pytest

from imagenet_train import Index, Piece, LoaderConfig, Source, TrainError, locate, read_index, read_pieces

NAME = "imagenet-train-000001.tar"


@pytest.fixture(scope="module")
def server(shards):
    """http://127.0.0.1:PORT/ on the shards."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=shards)
    handler.func.log_message = lambda *args: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}/"
        httpd.shutdown()


def read_piece(index: Index, piece: Piece, **how):
    """The samples of one piece, without retries unless `how` says otherwise."""
    reader = LoaderConfig(index, True, 4, 32, **{"retries": 0, "timeout": 20} | how)
    return read_pieces([piece], reader, multiprocessing.Event())


def expected(shards: Path, name: str = NAME) -> list[tuple[str, bytes, bytes]]:
    with tarfile.open(shards / name) as tar:
        data = [(m.name.partition(".")[0], tar.extractfile(m).read()) for m in tar]
    return [(key, cls, jpg) for (key, cls), (_, jpg) in zip(data[::2], data[1::2])]


def found(samples) -> list[tuple[str, bytes, bytes]]:
    return [(sample["__key__"], sample["cls"], sample["jpg"]) for sample in samples]


# ---------------------------------------------------------------- prefixes


@pytest.mark.parametrize(
    "prefix, place",
    [
        ("./data", "./data/x.tar"),
        ("/data/", "/data/x.tar"),
        ("/data/%s", "/data/x.tar"),
        ("/my data/100%", "/my data/100%/x.tar"),
        ("pipe:cat /data/", "pipe:cat /data/x.tar"),
        ("pipe:gsutil cat gs://bucket/%s", "pipe:gsutil cat gs://bucket/x.tar"),
        ("pipe:curl -s http://host/a%20b/", "pipe:curl -s http://host/a%20b/x.tar"),
        ("pipe:curl -s 'http://host/a%20b/%s?x=%2F' | cat", "pipe:curl -s 'http://host/a%20b/x.tar?x=%2F' | cat"),
        ("http://host", "pipe:curl -sSfL --connect-timeout 30 http://host/x.tar"),
        ("https://host/a%20b/", "pipe:curl -sSfL --connect-timeout 30 https://host/a%20b/x.tar"),
        ("http://host/get?f=%s&t=a%2Fb", "pipe:curl -sSfL --connect-timeout 30 'http://host/get?f=x.tar&t=a%2Fb'"),
        ("http://host/get?f=", "pipe:curl -sSfL --connect-timeout 30 'http://host/get?f=x.tar'"),
    ],
)
def test_locate(prefix, place):
    assert locate(prefix, "x.tar") == place


def test_a_url_that_needs_a_command_says_so():
    with pytest.raises(TrainError, match="pipe:gsutil cat"):
        locate("gs://bucket/", "x.tar")


PREFIXES = {
    "folder": "{folder}",
    "folder with a slash": "{folder}/",
    "pattern": "{folder}/%s",
    "http": "{url}",
    "http pattern": "{url}%s?token=a%20b",
    "the README's curl": "pipe:curl -s {url}",
    "command with a pattern": "pipe:cat '{folder}/'%s | cat",
    "command without": "pipe:cat {folder}/",
}


@pytest.mark.parametrize("kind", PREFIXES)
def test_a_piece_from_any_place(shards, server, kind):
    index = read_index(PREFIXES[kind].format(folder=shards, url=server), "train")
    truth = expected(shards)
    assert len(truth) == index.counts[1] == 7
    for start, stop in ((0, 7), (0, 3), (2, 5), (6, 7), (5, 7)):
        assert found(read_piece(index, Piece(1, start, stop))) == truth[start:stop]


def test_a_folder_whose_name_needs_quotes(shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "a b'c$(touch x)%20")
    assert found(read_piece(read_index(str(folder), "train"), Piece(1, 0, 7))) == expected(shards)


# ---------------------------------------------------------------- the index


def test_index(shards):
    index = read_index(str(shards), "train")
    assert index.total == 60 and len(index.classes) == 10
    assert index.names == sorted(path.name for path in shards.glob("imagenet-train-*.tar"))


def test_no_index(tmp_path, server):
    with pytest.raises(TrainError, match=r"imagenet-train\.json: No such file.*imagenet_shards\.py"):
        read_index(str(tmp_path), "train")
    with pytest.raises(TrainError, match=r"exit status 22.*is --shards=http://.*/nowhere right"):
        read_index(server + "nowhere", "train")
    with pytest.raises(TrainError, match="expected an index, found .*<!DOCTYPE"):  # without -f a 404 is a page
        read_index(f"pipe:curl -s {server}nowhere/", "train")
    with pytest.raises(TrainError, match="exit status 127, saying .*not found"):
        read_index("pipe:no-such-command ", "train")
    with pytest.raises(TrainError, match="found nothing"):
        read_index("pipe:true ", "train")


def spoiled(change) -> bytes:
    index = {"shardlist": [{"url": f"{x}.tar", "nsamples": 3, "filesize": 9, "sha256": "ab" * 32} for x in "ab"], "classes": ["n0", "n1"]}
    change(index)
    return json.dumps(index).encode()


HOSTILE = {
    "a path": spoiled(lambda i: i["shardlist"][0].update(url="../../etc/passwd.tar")),
    "a command": spoiled(lambda i: i["shardlist"][0].update(url="a;touch${IFS}x.tar")),
    "an option": spoiled(lambda i: i["shardlist"][0].update(url="-o.tar")),
    "a newline": spoiled(lambda i: i["shardlist"][0].update(url="a.tar\n")),
    "a checksum with a path": spoiled(lambda i: i["shardlist"][0].update(sha256="../../x")),
    "a size that is none": spoiled(lambda i: i["shardlist"][0].update(filesize="1e9")),
    "no name": spoiled(lambda i: i["shardlist"][0].update(url=None)),
    "a negative count": spoiled(lambda i: i["shardlist"][0].update(nsamples=-3)),
    "a fraction": spoiled(lambda i: i["shardlist"][0].update(nsamples=3.5)),
    "true": spoiled(lambda i: i["shardlist"][0].update(nsamples=True)),
    "twice": spoiled(lambda i: i["shardlist"][0].update(url="b.tar")),
    "no samples": spoiled(lambda i: i.update(shardlist=[])),
    "no classes": spoiled(lambda i: i.update(classes=[])),
    "classes that are no names": spoiled(lambda i: i.update(classes=[1, 2])),
    "a list": b"[]",
    "deep": b"[" * 100_000,
    "a text": b"hello",
    "not UTF-8": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_index_is_one_clear_error(tmp_path, name):
    (tmp_path / "imagenet-train.json").write_bytes(HOSTILE[name])
    with pytest.raises(TrainError, match=r"imagenet-train\.json: (expected an index|the index)") as error:
        read_index(str(tmp_path), "train")
    assert len(str(error.value)) < 600 and "\n" not in str(error.value)


# ---------------------------------------------------------------- shards that are not whole


def offsets(path: Path) -> dict[str, int]:
    """Where to cut a shard: at every kind of place."""
    members = tarfile.open(path).getmembers()
    last = members[-1]
    return {
        "nothing": 0,
        "in the first header": 100,
        "between members": members[4].offset,
        "between cls and jpg": members[5].offset,
        "in a header": members[6].offset + 300,
        "in an image": members[7].offset_data + 1000,
        "in the last image": last.offset_data + last.size - 1,
        "in the last padding": last.offset_data + last.size,
    }


@pytest.mark.parametrize("how", ["file", "pipe"])
@pytest.mark.parametrize("place", ["nothing", "in the first header", "between members", "between cls and jpg",
                                   "in a header", "in an image", "in the last image", "in the last padding"])
def test_a_cut_shard_gives_right_samples_then_the_error(shards, tmp_path, place, how):
    folder = shutil.copytree(shards, tmp_path / "data")
    data = (folder / NAME).read_bytes()
    (folder / NAME).write_bytes(data[: offsets(folder / NAME)[place]])
    index = read_index(str(folder) if how == "file" else f"pipe:cat {folder}/", "train")
    got = []
    with pytest.raises(TrainError) as error:
        for sample in read_piece(index, Piece(1, 0, 7)):
            got.append(sample)
    assert found(got) == expected(shards)[: len(got)]
    assert f"{NAME}: found {len(got)} of 7 samples" in str(error.value)


def test_more_samples_than_the_index_lists(shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "data")
    shutil.copy(folder / "imagenet-train-000001.tar", folder / "imagenet-train-000008.tar")  # 7 instead of 4
    with pytest.raises(TrainError, match="imagenet-train-000008.tar: found . of 4 samples, then more than .* bytes"):
        list(read_piece(read_index(str(folder), "train"), Piece(8, 0, 4)))


def test_a_member_missing(shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "data")
    with tarfile.open(shards / NAME) as old, tarfile.open(folder / NAME, "w") as new:
        for place, member in enumerate(old):
            if place != 5:  # the third sample's image
                new.addfile(member, old.extractfile(member))
    with pytest.raises(TrainError, match="found 2 of 7 samples, then sample .* lacks a member"):
        list(read_piece(read_index(str(folder), "train"), Piece(1, 0, 7)))


@pytest.mark.parametrize(
    "command, said",
    [
        ("cat {f}/%s; exit 7", "found 7 of 7 samples; the command ended with exit status 7"),
        ("cat {f}/%s; echo no space >&2; exit 1", "exit status 1, saying .no space"),
        ("head -c 9000 {f}/%s; exit 3", "of 7 samples, then cut within a .*exit status 3"),
        ("head -c 9000 {f}/%s", "of 7 samples, then cut within a "),
        ("true || echo %s", "found 0 of 7 samples in"),
        ("exit 9; echo %s", "found 0 of 7 samples; .*exit status 9"),
        ("echo '<html>%s not found</html>'", "then a page that says .imagenet-train-000001.tar not found"),
        ("yes '<html>%s not found</html>' | head -c 9999", "then a page that says .imagenet-train-000001.tar not found"),
        ("head -c 9999 /dev/urandom; echo %s", "then a damaged tar header"),
        ("kill -9 $$; echo %s", "exit status -9"),
    ],
)
def test_commands_that_fail(shards, command, said):
    index = read_index(str(shards), "train")._replace(prefix="pipe:" + command.format(f=shards))
    with pytest.raises(TrainError, match=said) as error:
        list(read_piece(index, Piece(1, 0, 7)))
    assert NAME in str(error.value) and "\n" not in str(error.value)


def alive(group: int) -> list[str]:
    """The states of a group's processes that still run a second later; not of those that only wait to be reaped."""
    for _ in range(50):
        stats = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
                stats.append(path.read_text().rpartition(")")[2].split())
        states = [stat[0] for stat in stats if int(stat[2]) == group and stat[0] != "Z"]
        if not states:
            break
        time.sleep(0.02)  # a SIGKILL takes its time
    return states


def test_a_piece_that_ends_early_ends_its_command_in_silence(shards, tmp_path, capfd):
    """… with all the command's children, and leaves no descriptor behind."""
    index = read_index(str(shards), "train")
    slow = f"pipe:echo $$ > {tmp_path}/pid; cat {shards}/%s | (cat; sleep 300; exit 5)"
    before = len(os.listdir("/proc/self/fd"))
    assert len(list(read_piece(index._replace(prefix=slow), Piece(1, 0, 3)))) == 3
    group = int((tmp_path / "pid").read_text())
    assert not alive(group)
    assert len(os.listdir("/proc/self/fd")) == before
    assert capfd.readouterr().err == ""


def test_a_reader_that_is_dropped_ends_its_command(shards):
    source = Source("pipe:yes", 5, 1 << 20)
    assert source.read(4) == b"y\ny\n"
    source.close()
    assert source.process.returncode is not None
