"""Training and verifying from where shards really are: nginx, another host, and buckets through gsutil and aws."""

import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import places
import pytest
from conftest import convert
from runs import SCRIPT, SMALL, train

import imagenet_shards

PREFIXES = ["pipe:curl -s ", ""]  # before http://…; the first has no -f, so that an error page is its output


@pytest.fixture(scope="module")
def bucket(tree, tmp_path_factory) -> Path:
    """The tree in a shard a split, for gsutil and aws take a second of CPU to start; under holes/ only the indexes."""
    folder = tmp_path_factory.mktemp("root") / "bucket"
    assert convert(tree, folder) == 0
    (folder / "holes").mkdir()
    for index in folder.glob("imagenet-*.json"):
        shutil.copy(index, folder / "holes")
    return folder


def verify(prefix: str) -> int:
    return imagenet_shards.main(["--verify", f"--shards={prefix}", "--workers=2", "--retry-for=0"])


def one_line(err: str) -> str:
    """The only line on stderr, as it must be of a run that fails for good: no traceback, no second try."""
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("imagenet_train.py: "), err
    return lines[0]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_from_nginx_with_one_request_a_shard_and_epoch(shards, tmp_path, capsys, prefix):
    with places.nginx(shards, tmp_path / "log") as url:
        assert train(prefix + url, tmp_path / "out", "--max-epochs=2", "--workers=1") == 0
        assert verify(prefix + url) == 0
    out = capsys.readouterr().out
    assert out.count("validated 30/30 images") == 2 and out.count("all as the index says") == 2
    status = 200 if prefix else 206  # a command reads a shard as a whole; here it has one block, so one range
    counts = Counter((tmp_path / "log").read_text().splitlines())
    names = [path.name for path in shards.glob("*.tar")] + [f"imagenet-{split}.json" for split in ("train", "val")]
    assert {line.split()[1] for line in counts} == {str(status)}
    requests = {name: counts[f"127.0.0.1 {status} /{name}"] for name in names}
    probed = [] if prefix else [f"imagenet-{split}-000000.tar" for split in ("train", "val")]  # for ranges, per program
    assert requests == {name: (2 if name.endswith("json") else 3) + 2 * (name in probed) for name in names}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_what_nginx_answers_instead_of_a_shard_is_one_line(shards, tmp_path, capfd, prefix):
    folder, name, index = shutil.copytree(shards, tmp_path / "data"), "imagenet-train-000003.tar", "imagenet-val.json"
    login = f"location = /{name} {{ default_type text/html; return 200 '<html><title>Sign in</title></html>'; }}"

    def wrong(url: str) -> str:
        assert train(prefix + url, tmp_path / "out", "--workers=1", "--retry-for=0") == 1
        return one_line(capfd.readouterr().err.replace(ignored.format(url), ""))

    ignored = "imagenet_train.py: {}: the server ignores ranges; files are read from their beginning\n"
    with places.nginx(folder, more=login) as url:
        line = wrong(url)  # status 200, as of a proxy; it might pass, a 404 does not
        assert f"{name}, 7 samples at byte 0" in line and "a page that says 'Sign in'" in line and url + name in line
    (folder / name).unlink()
    with places.nginx(folder) as url:
        line = wrong(url)
        assert f"{name}, 7 samples at byte 0" in line and "404" in line and url + name in line
        assert verify(prefix + url) == 1
        problem, summary = capfd.readouterr().err.splitlines()
        assert f"problem: {name}: " in problem and "1 problem, listed above" in summary
        (folder / index).unlink()
        line = wrong(url)
        assert index in line and ("404" in line) and url in line


def test_from_another_host(shards, tmp_path):
    """The trainer begins with its cable unplugged, says so, and goes on when it is plugged in."""
    with places.two_hosts() as (one, other), places.nginx(shards, tmp_path / "log", other) as url:
        cable = [*one.command, "ip", "link", "set", one.interface]
        subprocess.run([*cable, "down"], check=True)
        command = [sys.executable, SCRIPT, *SMALL, f"--shards={url}", f"--output={tmp_path}/out"]
        run = subprocess.Popen(
            [*one.command, *command, "--max-epochs=1", "--workers=2"], env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        try:
            said = next((line for line in run.stderr if line.startswith("imagenet_train.py: ")), "")
            assert url.removeprefix("http://").split(":")[0] in said and "next try in" in said
            subprocess.run([*cable, "up"], check=True)
            out, err = run.communicate(timeout=300)
        finally:
            run.kill()
            run.wait()
    assert run.returncode == 0 and "validated 30/30 images" in out, err
    assert {line.split()[0] for line in (tmp_path / "log").read_text().splitlines()} == {one.address}


@pytest.mark.long
@pytest.mark.parametrize(
    "command, missing",
    [("gsutil cat gs://bucket/%s", "No URLs matched"), ("aws s3 cp s3://bucket/%s -", "Not Found")],
    ids=["gsutil", "aws"],
)
def test_from_a_bucket(bucket, tmp_path, monkeypatch, capfd, command, missing):
    """The shards are there; then one is not, then nor is the bucket."""
    prefix = f"pipe:{command}"
    holes, nowhere = prefix.replace("%s", "holes/%s"), prefix.replace("bucket/", "no-bucket/")
    with places.gcs(bucket.parent) if "gsutil" in command else places.s3("bucket", bucket) as env:
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        assert train(prefix, tmp_path / "out", "--workers=1") == 0
        assert "validated 30/30 images" in capfd.readouterr().out
        assert train(holes, tmp_path / "holes", "--workers=1", "--retry-for=0") == 1
        line, place = one_line(capfd.readouterr().err), "//bucket/holes/imagenet-train-000000.tar"
        assert "imagenet-train-000000.tar, 60 samples at byte 0" in line and place in line and missing in line
        assert train(nowhere, tmp_path / "nowhere") == 1
        line = one_line(capfd.readouterr().err)
        assert "imagenet-train.json" in line and "404" in line and "//no-bucket/" in line
        assert verify(nowhere) == 1
        assert "//no-bucket/" in capfd.readouterr().err.splitlines()[-1]
