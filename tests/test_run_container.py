"""The container for real, where an engine answers: ./run builds it, makes shards in it, trains, is stopped, serves."""

import fcntl
import filecmp
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import places
import pytest
import runs
from pods import SETTINGS, TOP, pod_of, wait_until

ENGINE = os.environ.get("engine", "docker")
IMAGE = "imagenet-webdataset-test"  # stays when the tests end: its layers are the cache that spares the next build
SMALL = [*runs.SMALL, "--workers=1", "--checkpoint-every=2"]
ONE_EPOCH = [*SMALL, "--max-epochs=1"]

STREAMS = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}

answers = shutil.which(ENGINE) and subprocess.run([ENGINE, "info"], capture_output=True).returncode == 0
pytestmark = [
    pytest.mark.skipif(not answers, reason=f"`{ENGINE} info` does not answer: no container engine here"),
    pytest.mark.timeout(3600),  # the first build brings gigabytes
]


def engine(*arguments: str) -> str:
    return subprocess.run([ENGINE, *arguments], capture_output=True, text=True, check=True).stdout


def caller() -> dict:
    """Who runs ./run. For root: a user who may use Docker and can read ImageNet through a supplementary group only."""
    if os.getuid() or ENGINE != "docker":  # podman's images are each user's own
        return {"user": os.getuid(), "group": os.getgid(), "extra_groups": os.getgroups()}
    socket = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock").removeprefix("unix://")
    return {"user": 1234, "group": 1235, "extra_groups": [1236, os.stat(socket).st_gid]}


class Desk:
    """A user's folder with a copy of the checkout, ImageNet in `tree`, shards in `my shards`, output in `out`."""

    def __init__(self, folder: Path, tree: Path) -> None:
        self.folder, self.who = folder, caller()
        ignore = (TOP / ".dockerignore").read_text()
        for name in ["run", "config.sh", "Dockerfile", ".dockerignore", *re.findall("^!(.*)", ignore, re.MULTILINE)]:
            (folder / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(TOP / name, folder / "checkout" / name)
        shutil.copytree(tree, folder / "tree")
        for path in [folder, *folder.rglob("*")]:
            os.chown(path, self.who["user"], self.who["group"])
        for path in [folder / "tree", *(folder / "tree").rglob("*")]:
            if self.who["user"] != os.getuid():
                os.chown(path, 0, 1236)
                path.chmod(0o750 if path.is_dir() else 0o640)
        folder.chmod(0o755)

    def start(self, *arguments: str, streams: dict = STREAMS, **settings: str) -> subprocess.Popen:
        """./run, with settings of config.sh or other variables."""
        env = {name: value for name, value in os.environ.items() if name not in SETTINGS}
        env |= {"HOME": str(self.folder), "engine": ENGINE, "image": IMAGE, "shm": "1g"}
        env |= {"imagenet": "tree", "shards": "my shards", "output": "out"} | settings
        return subprocess.Popen(
            ["checkout/run", *arguments], cwd=self.folder, env=env, text=True, **streams, **self.who,
            # A job in the background inherits it ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip

    def run(self, *arguments: str, status: int = 0, **settings: str) -> str:
        """./run to its end, which must be of this status; what it printed."""
        process = self.start(*arguments, **settings)
        out, _ = process.communicate()
        assert process.returncode == status, out[-2000:]
        return out


@pytest.fixture(scope="module")
def desk(tree) -> Iterator[Desk]:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to other users
        desk = Desk(Path(folder), tree)
        with open(__file__) as lock:  # of several test processes one builds, the others find the result
            fcntl.flock(lock, fcntl.LOCK_EX)
            desk.run("build")
        yield desk


@pytest.fixture(scope="module")
def packed(desk) -> Path:
    desk.run("imagenet_shards.py", "--maxcount=7", "--workers=2")
    desk.run("imagenet_shards.py", "--verify", imagenet="nowhere")
    return desk.folder / "my shards"


def test_shards_made_in_the_container_are_those_made_outside_and_belong_to_the_caller(packed, desk, shards):
    names, here = ([str(path.relative_to(top)) for path in sorted(top.rglob("*"))] for top in (shards, packed))
    files = [name for name in names if (shards / name).is_file()]
    assert here == names and filecmp.cmpfiles(shards, packed, files, shallow=False) == (files, [], [])
    owners = {(path.stat().st_uid, path.stat().st_gid) for path in packed.rglob("*")}
    assert owners == {(desk.who["user"], desk.who["group"])}


def test_training_with_the_arguments_and_the_rights_of_train_yml_resumes_after_it_was_stopped(packed, desk):
    """From a web server on this machine, by curl."""
    output, log = desk.folder / "locked", desk.folder / "log"
    output.mkdir()
    os.chown(output, 1000, 1000)  # as fsGroup does
    with places.nginx(packed) as url, open(log, "w") as file:
        pod, container = pod_of(shards=f"pipe:curl -sf {url}")
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}
        }  # fmt: skip
        user = "{runAsUser}:{runAsGroup}".format(**pod["securityContext"])
        args = [word for word in container["args"] if not word.startswith("--workers=")]
        words = ["run", "--rm", "--network=host", "--read-only", "--tmpfs=/tmp", "--cap-drop=ALL", "--shm-size=1g",
                 "--security-opt=no-new-privileges", f"--user={user}", f"--volume={output}:/output",
                 f"--name={IMAGE}-pod", IMAGE, *args, *ONE_EPOCH]
        with subprocess.Popen([ENGINE, *words], stdout=file, stderr=file) as first:
            wait_until(lambda: [*output.rglob("last.ckpt")], first)
            began = time.monotonic()
            engine("stop", "--time=60", f"{IMAGE}-pod")
            assert first.wait() == 143 and time.monotonic() < began + 30, log.read_text()
        assert "validated 30/30 images" in engine(*words)


def test_training_from_buckets_with_credentials_in_a_file_and_in_variables(packed, desk, tmp_path):
    image, boto = f"{IMAGE}-tools", desk.folder / ".boto"
    desk.run("build", "--build-arg", "tools=gcsfs s3fs gsutil awscli", image=image)
    shutil.copytree(packed, tmp_path / "bucket")
    with places.gcs(tmp_path) as env:
        boto.write_text(re.sub("state_dir.*", "", Path(env["BOTO_CONFIG"]).read_text()))
        os.chown(boto, desk.who["user"], desk.who["group"])
        boto.chmod(0o600)
        command = ["imagenet_train.py", "--shards=pipe:gsutil cat gs://bucket/%s", *ONE_EPOCH]
        assert "validated 30/30 images" in desk.run(*command, image=image, credentials=str(boto))
    with places.s3("bucket", packed) as env:
        names = " ".join(name for name in env if name.startswith("AWS_"))
        command = ["imagenet_train.py", "--shards=s3://bucket/", *ONE_EPOCH]
        assert "validated 30/30 images" in desk.run(*command, image=image, credentials=names, **env)
    engine("image", "rm", image)


def test_statuses_and_arguments_pass_through(desk):
    out = desk.run("imagenet_shards.py", "--imagenet=/no where", status=1)
    assert "/no where" in out and out.count("\n") == 1
    assert "unrecognized arguments: --bogus" in desk.run("imagenet_shards.py", "--bogus", status=2)
    desk.run("shell", "-c", "exit 7", status=7)
    assert desk.run("shell", "-c", 'printf "<%s>" "$@"', "-", "a  b", "*", "", "$HOME") == "<a  b><*><><$HOME>"
    assert "--max-epochs" in desk.run("imagenet_train.py", "--help")


def test_only_data_output_and_tmp_can_be_written_and_programs_run_from_tmp(packed, desk):
    (desk.folder / "out").mkdir(exist_ok=True)
    os.chown(desk.folder / "out", desk.who["user"], desk.who["group"])
    script = 'for folder in / /app /imagenet /usr /data /output /tmp "$HOME"; do'
    script += ' touch $folder/new 2>/dev/null && echo $folder; done; rm /data/new'
    assert desk.run("shell", "-c", script).split() == ["/data", "/output", "/tmp", "/tmp"]
    out = desk.run("shell", "-c", "cp /bin/echo /tmp && /tmp/echo yes; df -k /dev/shm")
    assert out.startswith("yes\n") and " 1048576 " in out  # KiB
    assert desk.run("shell", "-c", "cat /imagenet/standin.json")


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_training(number, status, packed, desk):
    """./run gives no --init: the image has its own process 1."""
    assert desk.run("shell", "-c", "cat /proc/1/comm") == "tini\n"
    output = desk.folder / f"out-{status}"
    process = desk.start("imagenet_train.py", *SMALL, "--max-epochs=1000", output=str(output))
    wait_until(lambda: [*output.rglob("last.ckpt")], process)
    assert {path.stat().st_uid for path in output.rglob("*")} == {desk.who["user"]}
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == status and "Traceback" not in out, out[-2000:]


def test_interrupt_key_of_a_terminal(desk):
    def shell() -> int:
        return desk.start("shell", "-c", "echo ready; exec sleep 1000", streams={}).wait()

    assert runs.in_terminal(80, shell, "ready", b"\x03")[0] == 130


def test_serve(packed, desk):
    web = os.environ.get("nginx") or re.search(r"^nginx=\$\{nginx:-(\S+)\}", (TOP / "config.sh").read_text(), re.M)[1]
    find = [ENGINE, "image", "inspect", web], [ENGINE, "pull", web]
    if all(subprocess.run(command, capture_output=True).returncode for command in find):
        pytest.skip(f"{web}: no such image, and no registry to pull it from")
    address = f"127.0.0.1:{places.free_port()}"
    process = desk.start("serve", port=address, nginx=web)
    curl = ["curl", "-sf", "--retry=50", "--retry-all-errors", "--retry-delay=1", f"http://{address}/imagenet-train.json"]
    served = subprocess.run(curl, capture_output=True).stdout
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate()
    assert served == (packed / "imagenet-train.json").read_bytes() and process.returncode == 0, out
