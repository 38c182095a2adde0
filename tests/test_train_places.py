"""Training and verifying from where shards really lie: nginx, another host, and buckets through gsutil and aws."""

import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import places
import pytest
from conftest import convert
from training import SMALL, train

import imagenet_shards

SCRIPT = Path(__file__).parent.parent / "imagenet_train.py"
PREFIXES = ["pipe:curl -s ", ""]  # before http://…; the first is for those who like it by hand, and has no -f


@pytest.fixture(scope="module")
def bucket(tree, tmp_path_factory) -> Path:
    """What goes into a bucket: the tree in one shard a split, for gsutil and aws take a second of CPU to start.

    And under holes/ both indexes, but no shards.
    """
    folder = tmp_path_factory.mktemp("root") / "bucket"
    assert convert(tree, folder) == 0
    (folder / "holes").mkdir()
    for index in folder.glob("imagenet-*.json"):
        shutil.copy(index, folder / "holes")
    return folder


def verify(prefix: str) -> int:
    return imagenet_shards.main(["--verify", f"--shards={prefix}", "--workers=2", "--retries=0"])


def one_line(err: str) -> str:
    """The only line on stderr, as it must be of a run that fails for good: no traceback, no second try."""
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("imagenet_train.py: "), err
    return lines[0]


# ---------------------------------------------------------------- a web server


@pytest.mark.parametrize("prefix", PREFIXES)
def test_from_nginx_with_one_request_a_shard_and_epoch(shards, tmp_path, capsys, prefix):
    with places.nginx(shards, tmp_path / "log") as url:
        assert train(prefix + url, tmp_path / "out", "--max-epochs=2", "--workers=1") == 0
    assert capsys.readouterr().out.count("validated 30/30 images") == 2
    status = 200 if prefix else 206  # a command reads a shard as a whole; here it has one block, so one range
    expected = Counter({f"127.0.0.1 {status} /{path.name}": 2 for path in shards.glob("*.tar")})
    expected += Counter({f"127.0.0.1 {status} /imagenet-{split}.json": 1 for split in ("train", "val")})
    if not prefix:  # whether the server has ranges
        expected += Counter({f"127.0.0.1 206 /imagenet-{split}-000000.tar": 1 for split in ("train", "val")})
    assert Counter((tmp_path / "log").read_text().splitlines()) == expected


def test_verify_through_nginx(shards, capsys):
    with places.nginx(shards) as url:
        for prefix in PREFIXES:
            assert verify(prefix + url) == 0
    assert capsys.readouterr().out.count("all as the index says") == 2 * len(PREFIXES)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_what_nginx_answers_instead_of_a_shard_is_one_line(shards, tmp_path, capfd, prefix):
    folder, name, index = shutil.copytree(shards, tmp_path / "data"), "imagenet-train-000003.tar", "imagenet-val.json"
    login = f"location = /{name} {{ default_type text/html; return 200 '<html><title>Sign in</title></html>'; }}"

    def wrong(url: str, *flags: str) -> str:
        assert train(prefix + url, tmp_path / "out", "--workers=1", *flags) == 1
        return one_line(capfd.readouterr().err)

    with places.nginx(folder, more=login) as url:
        line = wrong(url, "--retries=0")  # status 200, as of a proxy; it might pass, a 404 does not
        assert f"{name}, 7 samples at byte 0" in line and "a page that says 'Sign in'" in line and url + name in line
    (folder / name).unlink()
    with places.nginx(folder) as url:
        line = wrong(url)
        assert f"{name}, 7 samples at byte 0" in line and "404" in line and url + name in line
        assert verify(prefix + url) == 1
        fault, summary = capfd.readouterr().err.splitlines()
        assert fault.startswith(f"# problem: {name}: ") and "1 problem, listed above" in summary
        (folder / index).unlink()
        line = wrong(url)
        assert index in line and "404" in line and f"--shards={prefix}{url}" in line


# ---------------------------------------------------------------- another host


def test_from_another_host(shards, tmp_path):
    """The trainer begins with its cable unplugged, says so, and goes on when it is plugged in."""
    with places.two_hosts() as (one, other):
        cable = [*one.command, "ip", "link", "set", one.interface]
        unplugged = one != other  # else this is the loopback, which others use
        with places.nginx(shards, tmp_path / "log", other) as url:
            if unplugged:
                subprocess.run([*cable, "down"], check=True)
            command = [sys.executable, SCRIPT, *SMALL, f"--shards={url}", f"--output={tmp_path}/out"]
            run = subprocess.Popen(
                [*one.command, *command, "--max-epochs=1", "--workers=2"], env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            try:
                if unplugged:
                    said = next((line for line in run.stderr if line.startswith("imagenet_train.py: ")), "")
                    assert url.removeprefix("http://").split(":")[0] in said and "try 1 of 5" in said
                    subprocess.run([*cable, "up"], check=True)
                out, err = run.communicate(timeout=300)
            finally:
                run.kill()
                run.wait()
    assert run.returncode == 0, err
    assert "validated 30/30 images" in out
    assert {line.split()[0] for line in (tmp_path / "log").read_text().splitlines()} == {one.address}


# ---------------------------------------------------------------- buckets


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
        assert train(holes, tmp_path / "holes", "--workers=1") == 1
        line, place = one_line(capfd.readouterr().err), "//bucket/holes/imagenet-train-000000.tar"
        assert "imagenet-train-000000.tar, 60 samples at byte 0" in line and place in line and missing in line
        assert train(nowhere, tmp_path / "nowhere") == 1
        line = one_line(capfd.readouterr().err)
        assert "imagenet-train.json" in line and "404" in line and f"--shards={nowhere}" in line
        assert verify(nowhere) == 1
        assert nowhere.removeprefix("pipe:").split("%s")[0] in capfd.readouterr().err.splitlines()[-1]
