"""Prefix → index → samples: every place that a prefix can name, and what is printed when something is wrong there."""

import json
import shutil
from dataclasses import replace

import faults
import places
import pytest
from faults import damaged
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reading import NAME, expected, found, read_shard

from imagenet_train import PermanentError, TrainError, locate, printable, read_index


@pytest.fixture(scope="module")
def server(blocks):
    """http://127.0.0.1:PORT/ on the shards."""
    with faults.fault_server(blocks) as server:
        yield server.url


# ---------------------------------------------------------------- prefixes


@pytest.mark.parametrize(
    "prefix, place",
    [
        ("./data", "./data/x.tar"),
        ("/data/", "/data/x.tar"),
        ("/data/%s", "/data/x.tar"),
        ("/my data/100%", "/my data/100%/x.tar"),
        ("a::b", "a::b/x.tar"),
        ("pipe:cat /data/", "pipe:cat /data/x.tar"),
        ("pipe:gsutil cat gs://bucket/%s", "pipe:gsutil cat gs://bucket/x.tar"),
        ("pipe:curl -s http://host/a%20b/", "pipe:curl -s http://host/a%20b/x.tar"),
        ("pipe:curl -s 'http://host/a%20b/%s?x=%2F' | cat", "pipe:curl -s 'http://host/a%20b/x.tar?x=%2F' | cat"),
        ("http://host", "http://host/x.tar"),
        ("https://host/a%20b/", "https://host/a%20b/x.tar"),
        ("http://host/get?f=%s&t=a%2Fb", "http://host/get?f=x.tar&t=a%2Fb"),
        ("http://host/get?f=", "http://host/get?f=x.tar"),
    ],
)
@pytest.mark.quick
def test_locate(prefix, place):
    assert locate(prefix, "x.tar") == place


@pytest.mark.parametrize(
    "location, shown",
    [
        ("/data/x.tar", "/data/x.tar"),
        ("https://host:8/x.tar", "https://host:8/x.tar"),
        ("https://me:secret@host/x.tar?token=secret", "https://host/x.tar?..."),
        ("pipe:curl -s 'http://me@host/x.tar?a=b' | cat", "pipe:curl -s 'http://host/x.tar?...' | cat"),
        ("pipe:cat a?b me@host", "pipe:cat a?b me@host"),
    ],
)
@pytest.mark.quick
def test_messages_show_no_user_no_password_and_no_query(location, shown):
    assert printable(location) == shown


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
def test_a_shard_from_any_place(blocks, server, kind):
    index = read_index(PREFIXES[kind].format(folder=blocks, url=server), "train")
    truth = expected(blocks)
    for start, stop in ((0, 7), (0, 3), (2, 5), (6, 7), (4, 7)):
        assert found(read_shard(index, start, stop)) == truth[start:stop]


def test_only_the_wanted_blocks_are_fetched(blocks, tmp_path):
    with places.nginx(blocks, tmp_path / "log", more="set $x 1;") as url:
        index = read_index(url, "train")
        assert found(read_shard(index, 4, 5)) == expected(blocks)[4:5]
    assert (tmp_path / "log").read_text().splitlines().count(f"127.0.0.1 206 /{NAME}") == 1


def test_a_folder_whose_name_needs_quotes(blocks, tmp_path):
    folder = shutil.copytree(blocks, tmp_path / "a b'c$(touch x)%20")
    assert found(read_shard(read_index(str(folder), "train"))) == expected(blocks)


def test_an_index_that_lies_elsewhere(blocks, tmp_path, server):
    for split in ("train", "val"):
        shutil.copy(blocks / f"imagenet-{split}.json", tmp_path)
    index = read_index(server, "train", index=str(tmp_path))
    assert index.prefix == server and found(read_shard(index)) == expected(blocks)
    with pytest.raises(TrainError, match="--index=/nowhere: no such folder"):
        read_index(server, "train", index="/nowhere")


def test_another_kind_of_url_is_refused():
    with pytest.raises(PermanentError, match="^az://bucket/x: cannot read az:// URLs; name a command: pipe:COMMAND %s"):
        read_index("az://bucket/x", "train")


@pytest.mark.parametrize("url", ["s3://bucket", "gs://bucket/"])
def test_bucket_urls_are_read_by_their_own_commands(blocks, tmp_path, monkeypatch, url):
    shutil.copytree(blocks, tmp_path / "bucket")
    with places.s3("bucket", blocks) if url.startswith("s3") else places.gcs(tmp_path) as env:
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        index = read_index(url, "train")
        assert not index.seekable and found(read_shard(index, timeout=60)) == expected(blocks)


# ---------------------------------------------------------------- the index


def test_index(blocks):
    index = read_index(str(blocks), "train")
    assert index.total == 60 and len(index.classes) == 10 and index.starts[:4] == [0, 3, 6, 7]
    assert index.names == sorted(path.name for path in blocks.glob("imagenet-train-*.tar"))
    assert index.digest != read_index(str(blocks), "val").digest


def test_no_index(tmp_path, server, tree):
    with pytest.raises(TrainError, match=r"imagenet-train\.json: No such file.*imagenet_shards\.py"):
        read_index(str(tmp_path), "train")
    with pytest.raises(TrainError, match=f"--shards={tmp_path}/dta: no such folder"):
        read_index(f"{tmp_path}/dta", "train")
    with pytest.raises(TrainError, match=f"--shards={tree}: a tree of images, not shards; .*--imagenet"):
        read_index(str(tree), "train")
    with pytest.raises(
        TrainError, match=r"nowhere/imagenet-train.json: HTTP status 404.*is --shards=http://.*/nowhere right"
    ):
        read_index(server + "nowhere", "train")
    with pytest.raises(
        TrainError, match="expected an index, found a page that says '404"
    ):  # without -f a 404 is a page
        read_index(f"pipe:curl -s {server}nowhere/", "train")
    with pytest.raises(TrainError, match="exit status 127: .*not found"):
        read_index("pipe:no-such-command ", "train")
    with pytest.raises(TrainError, match="found nothing"):
        read_index("pipe:true ", "train")
    with pytest.raises(TrainError, match="expected an index, found 67108864 bytes"):
        read_index("pipe:cat /dev/zero; true ", "train")


def test_an_unfinished_conversion_and_an_index_without_blocks(blocks, tmp_path):
    content = json.loads((blocks / "imagenet-train.json").read_text())
    for shard in content["shardlist"]:
        del shard["blocks"]
    (tmp_path / "imagenet-train.json").write_text(json.dumps(content))
    with pytest.raises(
        TrainError, match=f"no blocks; add them with: python3 imagenet_shards.py --index-only --shards={tmp_path}"
    ):
        read_index(str(tmp_path), "train")
    (tmp_path / "imagenet-train.json").write_text('{"__kind__": "imagenet-conversion-not-finished"}')
    with pytest.raises(TrainError, match="the conversion is not finished"):
        read_index(str(tmp_path), "train")


def changed(change) -> bytes:
    shard = {"nsamples": 3, "filesize": 99, "sha256": "ab" * 32}
    shards = [shard | {"url": f"{x}.tar", "blocks": [[0, 9, 2, 7], [9, 5, 1, 8]]} for x in "ab"]
    index = {"__kind__": "wids-shard-index-v1", "shardlist": shards, "classes": ["n0", "n1"], "class_names": None}
    change(index)
    return json.dumps(index).encode()


def shard(**values):
    return changed(lambda index: index["shardlist"][0].update(values))


HOSTILE = {
    "a path": shard(url="../../etc/passwd.tar"),
    "a command": shard(url="a;touch${IFS}x.tar"),
    "an option": shard(url="-o.tar"),
    "a newline": shard(url="a.tar\n"),
    "a checksum with a path": shard(sha256="../../x"),
    "a size that is none": shard(filesize="1e9"),
    "no name": shard(url=None),
    "a negative count": shard(blocks=[[0, 9, -2, 7]]),
    "a fraction": shard(blocks=[[0, 9, 2.5, 7]]),
    "true": shard(blocks=[[0, 9, True, 7]]),
    "a block without samples": shard(blocks=[[0, 9, 0, 7]]),
    "a block beyond the shard": shard(blocks=[[0, 100, 2, 7]]),
    "blocks with a gap": shard(blocks=[[0, 9, 2, 7], [10, 5, 1, 8]]),
    "a huge block": shard(blocks=[[0, 1 << 40, 2, 7]], filesize=1 << 41),
    "a short block entry": shard(blocks=[[0, 9, 2]]),
    "blocks that are none": shard(blocks=3),
    "twice": shard(url="b.tar"),
    "no samples": changed(lambda i: i.update(shardlist=[])),
    "no classes": changed(lambda i: i.update(classes=[])),
    "classes that are no names": changed(lambda i: i.update(classes=[1, 2])),
    "too few class names": changed(lambda i: i.update(class_names=["tench"])),
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


def test_the_index_that_the_hostile_ones_were_made_of_is_read(tmp_path):
    (tmp_path / "imagenet-train.json").write_bytes(changed(lambda index: None))
    assert read_index(str(tmp_path), "train").total == 6


FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
KEYS = ["shardlist", "url", "filesize", "sha256", "classes", "blocks", "class_names", "__kind__"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=8),
    max_leaves=12,
)


@FUZZ
@given(st.one_of(damaged(changed(lambda i: None)), JSON.map(lambda v: json.dumps(v).encode()), st.binary(max_size=200)))
def test_fuzz_index(tmp_path, data):
    (tmp_path / "imagenet-train.json").write_bytes(data)
    try:
        index = read_index(str(tmp_path), "train")
        assert index.total > 0 and all("/" not in name for name in index.names)
    except TrainError as error:
        assert len(str(error)) < 600 and "\n" not in str(error)


def test_a_shard_that_is_not_what_the_index_says(blocks, tmp_path):
    """A new shard under an old index, of the right size or not: its bytes have other checksums."""
    folder = shutil.copytree(blocks, tmp_path / "data")
    shutil.copy(folder / "imagenet-train-000002.tar", folder / NAME)
    with pytest.raises(PermanentError, match=f"{NAME}, 3 samples at byte 0, .*: (CRC-32|found)"):
        list(read_shard(read_index(str(folder), "train")))


def test_a_missing_shard(blocks, tmp_path):
    index = replace(read_index(str(blocks), "train"), prefix=str(tmp_path))
    with pytest.raises(
        PermanentError, match=f"{NAME}, 3 samples at byte 0, from {tmp_path}/{NAME}: No such file or directory"
    ):
        list(read_shard(index))
