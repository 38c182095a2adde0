"""Reading from where shards really are: nginx, buckets, a hub, and the commands that read them, by forked processes."""

import gc
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import faults
import fsspec
import places
import pytest
from conftest import VAL_IMAGES
from reading import labels_of
from runs import train

import imagenet_shards
from imagenet_shards import UserError, read_index

ALL = list(range(VAL_IMAGES))
Answers = Callable[[], list[tuple[str, int]]]  # (file, status) of each request so far


@contextmanager
def place(kind: str, folder: Path, monkeypatch) -> Iterator[tuple[str, Answers]]:
    """A prefix of the files of a folder, which is called bucket, in a place of this kind; and the place's answers."""
    gc.collect()  # ends loader processes of earlier tests, which run_jobs() would kill
    for protocol in ("s3", "gs", "hf"):  # file systems of earlier tests, with their ports
        fsspec.get_filesystem_class(protocol).clear_instance_cache()

    def logged(path: str, pattern: str) -> Answers:
        return lambda: [(m["name"], int(m["status"])) for m in re.finditer(pattern, Path(path).read_text())]

    if kind in ("nginx", "pipe:curl"):
        with places.nginx(folder, folder.parent / "log") as url:
            prefix = url if kind == "nginx" else f"pipe:curl -sSf {url}"
            yield prefix, logged(f"{folder.parent}/log", r" (?P<status>\d+) /(?P<name>\S+)\n")
    elif kind == "hf":
        with faults.fault_server(folder) as server:
            monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": server.url.rstrip("/")})  # as HF_ENDPOINT does
            yield "hf://datasets/me/data", lambda: server.statuses
    else:
        with places.s3("bucket", folder) if kind in ("s3", "pipe:aws") else places.gcs(folder.parent) as env:
            for name, value in env.items():
                monkeypatch.setenv(name, value)
            prefix = {"s3": "s3://bucket", "gs": "gs://bucket/", "pipe:aws": "pipe:aws s3 cp s3://bucket/%s -",
                      "pipe:gsutil": "pipe:gsutil -q cat gs://bucket/%s"}  # fmt: skip
            request = r'GET \S*/(?P<name>[\w.-]+)\??\S* HTTP/1.1\\?" (?P<status>\d+)'
            yield prefix[kind], logged(env["SERVER_LOG"], request)


KINDS = ["nginx", "s3", "gs", "hf", "pipe:curl", pytest.param("pipe:aws", marks=pytest.mark.long),
         pytest.param("pipe:gsutil", marks=pytest.mark.long)]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_loader_processes_read_exact_ranges_and_a_missing_file_is_one_line(kind, unique, tmp_path, monkeypatch, capfd):
    """By two processes, after the main process has read the index; then verified by others."""
    bucket = shutil.copytree(unique, tmp_path / "bucket")
    shutil.copy(bucket / "imagenet-val.json", tmp_path)
    with place(kind, bucket, monkeypatch) as (prefix, answers):
        index = read_index(prefix, "val")
        assert labels_of(index) == ALL
        assert imagenet_shards.main(["--verify", f"--shards={prefix}", "--splits=val", "--workers=2"]) == 0
        if index.seekable:  # two processes share a block; verify reads the trailers too
            [(status, number)] = Counter(status for name, status in answers() if name.endswith(".tar")).items()
            assert status == 206 and number - 2 * len(index.blocks) - len(index.entries) in (0, 1)
        assert capfd.readouterr().err == ""
        nowhere = prefix.replace("bucket", "no-bucket")
        nowhere += "/none/" if kind in ("nginx", "hf", "pipe:curl") else ""
        with pytest.raises(UserError, match="imagenet-val.json.*: (.*no such file|exit status)"):
            read_index(nowhere, "val")
        other = read_index(nowhere, "val", index=str(tmp_path))
        with pytest.raises(UserError, match="imagenet-val-.*(no such file|exit status)") as error:
            labels_of(other)
        assert "\n" not in str(error.value)
        err = capfd.readouterr().err
        assert "Traceback" not in err and (not index.seekable or err == "")


@pytest.mark.parametrize("prefix", ["pipe:curl -s ", ""])
def test_training_from_nginx_with_one_request_a_shard_and_epoch(shards, tmp_path, capsys, prefix):
    with places.nginx(shards, tmp_path / "log") as url:
        assert train(prefix + url, tmp_path / "out", "--max-epochs=2", "--workers=1") == 0
    assert capsys.readouterr().out.count("validated 30/30 images") == 2
    counts = Counter((tmp_path / "log").read_text().splitlines())
    status = 200 if prefix else 206  # a command reads a shard as a whole; here it has one block, so one range
    names = {path.name: 2 for path in shards.glob("*.tar")} | {"imagenet-train.json": 1, "imagenet-val.json": 1}
    assert counts == {f"127.0.0.1 {status} /{name}": number for name, number in names.items()}


@pytest.mark.parametrize("kind", ["nginx", "s3", "gs", "hf", "pipe:curl"])
def test_shards_without_an_index_are_indexed_where_they_are(kind, unique, tmp_path, monkeypatch, capfd):
    """Into a folder, from which the index is then read."""
    bucket, mine = tmp_path / "bucket", tmp_path / "mine"
    bucket.mkdir()
    for number, shard in enumerate(sorted(unique.glob("imagenet-val-*.tar"))):
        shutil.copy(shard, bucket / f"theirs-{number}.tar")
    with place(kind, bucket, monkeypatch) as (prefix, answers):
        flags = ["--index-only", f"--index={mine}", "--splits=val", f"--names=theirs-{{0..{number}}}.tar"]
        assert imagenet_shards.main([f"--shards={prefix}", *flags, "--retry-for=0", "--workers=2"]) == 0
        index = read_index(prefix, "val", index=str(mine))
        assert labels_of(index) == ALL and capfd.readouterr().err == ""
        assert not index.seekable or {status for name, status in answers() if name.endswith(".tar")} <= {206, 416}
    assert [entry["sha256"] for entry in index.entries] == [
        entry["sha256"] for entry in read_index(str(unique), "val").entries
    ]
