"""The container for real, where an engine answers: ./run builds it, makes shards in it, trains, is stopped, serves."""

import fcntl
import filecmp
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import faults
import places
import pytest
from manifest import SETTINGS
from training import SMALL

TOP = Path(__file__).parent.parent
ENGINE = os.environ.get("engine", "docker")
IMAGE = "imagenet-webdataset-test"  # stays when the tests end: its layers are the cache that spares the next build
CONTEXT = ["Dockerfile", ".dockerignore", "requirements.txt", "tests/constraints.txt", "imagenet_shards.py"]
CONTEXT += ["imagenet_train.py"]
QUICK = [*SMALL, "--workers=1"]

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
        (folder / "checkout" / "tests").mkdir(parents=True)
        for name in [*CONTEXT, "run", "config.sh"]:
            shutil.copy(TOP / name, folder / "checkout" / name)
        shutil.copytree(tree, folder / "tree")
        for path in [folder, *folder.rglob("*")]:
            os.chown(path, self.who["user"], self.who["group"])
        for path in [folder / "tree", *(folder / "tree").rglob("*")]:
            if self.who["user"] != os.getuid():
                os.chown(path, 0, 1236)
                path.chmod(0o750 if path.is_dir() else 0o640)
        folder.chmod(0o755)

    def start(self, *arguments: str, **more) -> subprocess.Popen:
        env = {name: value for name, value in os.environ.items() if name not in SETTINGS}
        env |= {"HOME": str(self.folder), "engine": ENGINE, "image": IMAGE, "shm": "1g"}
        env |= {"imagenet": "tree", "shards": "my shards", "output": "out"} | more.pop("env", {})
        return subprocess.Popen(
            ["checkout/run", *arguments], cwd=self.folder, env=env, text=True, **self.who,
            **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} | more,
            # A job in the background inherits it ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def run(self, *arguments: str, status: int = 0, **more) -> str:
        """./run to its end, which must be of this status; what it printed."""
        process = self.start(*arguments, **more)
        out, _ = process.communicate()
        assert process.returncode == status, out[-2000:]
        return out


def layers(image: str) -> list[str]:
    return json.loads(engine("image", "inspect", "--format", "{{json .RootFS.Layers}}", image))


@pytest.fixture(scope="module")
def desk(tree):
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to other users
        desk = Desk(Path(folder), tree)
        with open(__file__) as lock:  # of several test processes one builds, the others find the result
            fcntl.flock(lock, fcntl.LOCK_EX)
            desk.run("build")
        yield desk


@pytest.fixture(scope="module")
def converted(desk) -> Path:
    desk.run("imagenet_shards.py", "--maxcount=7", "--workers=2")
    return desk.folder / "my shards"


def test_a_build_after_a_change_of_a_script_takes_all_before_the_scripts_from_the_cache(desk):
    with open(desk.folder / "checkout" / "imagenet_train.py", "a") as script:
        script.write("# changed\n")
    image = f"{IMAGE}-changed"
    desk.run("build", env={"image": image})
    try:
        assert desk.run("shell", "-c", "tail -n1 imagenet_train.py", env={"image": image}) == "# changed\n"
        before, after = layers(IMAGE), layers(image)
        # Two layers hold the scripts, as they came and with their mode set. A layer made anew has other times in it.
        assert after[:-2] == before[:-2] and after[-2] != before[-2] and len(after) > 4
    finally:
        engine("image", "rm", image)


def test_image_has_the_versions_that_are_pinned(desk):
    installed = desk.run("shell", "-c", "pip freeze --all").split()
    pinned = (TOP / "tests" / "constraints.txt").read_text()
    for name in ("torch", "torchvision", "numpy", "pillow", "webdataset", "pytorch-lightning", "torchmetrics", "tqdm"):
        version = next(line.split("==")[1] for line in installed if line.lower().startswith(f"{name}=="))
        assert re.search(f"^{name}=={re.escape(version.split('+')[0])}( ;|$)", pinned, re.MULTILINE), (name, version)


def test_shards_made_in_the_container_are_those_made_outside_and_belong_to_the_caller(converted, desk, shards):
    names, here = ([str(path.relative_to(top)) for path in sorted(top.rglob("*"))] for top in (shards, converted))
    files = [name for name in names if (shards / name).is_file()]
    assert here == names and len(files) == len(names) - 1  # .finished is a folder
    assert filecmp.cmpfiles(shards, converted, files, shallow=False) == (files, [], [])
    assert {(path.stat().st_uid, path.stat().st_gid) for path in converted.rglob("*")} == {
        (desk.who["user"], desk.who["group"])
    }


def test_verify_needs_no_imagenet(converted, desk):
    out = desk.run("imagenet_shards.py", "--verify", env={"imagenet": "nowhere"})
    assert out.count("all as the index says") == 2


def test_training(converted, desk):
    out = desk.run("imagenet_train.py", *QUICK, "--max-epochs=1")
    assert "validated 30/30 images" in out
    assert {path.stat().st_uid for path in (desk.folder / "out").rglob("last.ckpt")} == {desk.who["user"]}


def test_training_from_a_web_server_on_this_machine_by_curl_with_nothing_but_tmp_to_write_to(converted, desk):
    (desk.folder / "locked").mkdir(mode=0o777)
    (desk.folder / "locked").chmod(0o777)
    locked = ["--init", "--network=host", "--read-only", "--tmpfs=/tmp", "--cap-drop=ALL", "--shm-size=1g"]
    mount = [f"--volume={desk.folder}/locked:/output", "--security-opt=no-new-privileges"]
    with faults.fault_server(converted) as server:
        flags = [f"--shards=pipe:curl -s {server.url}", "--output=/output", *QUICK, "--max-epochs=1"]
        assert "validated 30/30 images" in engine("run", "--rm", *locked, *mount, IMAGE, "imagenet_train.py", *flags)
    assert list((desk.folder / "locked").rglob("last.ckpt"))


@pytest.fixture(scope="module")
def tools(desk) -> Iterator[str]:
    """The image with the commands of two buckets."""
    image = f"{IMAGE}-tools"
    desk.run("build", "--build-arg", "tools=gsutil awscli", env={"image": image})
    yield image
    engine("image", "rm", image)


@pytest.mark.parametrize("tool", ["gsutil", "aws"])
def test_a_bucket_and_back_with_credentials_in_a_file_or_variables(tool, tools, desk, tree, tmp_path):
    write, read = {
        "gsutil": ("pipe:gsutil -q cp - gs://bucket/%s", "pipe:gsutil cat gs://bucket/%s"),
        "aws": ("pipe:aws s3 cp - s3://bucket/%s", "pipe:aws s3 cp s3://bucket/%s -"),
    }[tool]
    (tmp_path / "bucket").mkdir()
    with places.gcs(tmp_path) if tool == "gsutil" else places.s3("bucket") as env:
        env = {"image": tools, "shards": f"record of {tool}", "output": f"out of {tool}"} | env
        if tool == "gsutil":
            boto = Path(env.pop("BOTO_CONFIG")).read_text()
            (desk.folder / ".boto").write_text(re.sub("state_dir.*", "", boto))
            os.chown(desk.folder / ".boto", desk.who["user"], desk.who["group"])
            (desk.folder / ".boto").chmod(0o600)
            env["credentials"] = f"{desk.folder}/.boto"
        else:
            env["credentials"] = "AWS_ENDPOINT_URL AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_DEFAULT_REGION"
        desk.run("imagenet_shards.py", f"--shards={write}", "--workers=2", env=env)
        assert {path.stat().st_uid for path in (desk.folder / f"record of {tool}").rglob("*")} == {desk.who["user"]}
        out = desk.run("imagenet_train.py", f"--shards={read}", *QUICK, "--max-epochs=1", env=env)
    assert "validated 30/30 images" in out


def test_statuses_pass_through(desk):
    out = desk.run("imagenet_shards.py", "--imagenet=/no where", status=1)
    assert "/no where: no such folder" in out and out.count("\n") == 1
    assert "unrecognized arguments: --bogus" in desk.run("imagenet_shards.py", "--bogus", status=2)
    desk.run("shell", "-c", "exit 7", status=7)


def test_arguments_arrive_as_given(desk):
    assert desk.run("shell", "-c", 'printf "<%s>" "$@"', "-", "a  b", "*", "", "$HOME") == "<a  b><*><><$HOME>"


def test_imagenet_can_be_read_and_not_written(desk):
    script = "cat /imagenet/standin.json && ! touch /imagenet/new 2>&1 && [ ! -w /imagenet ] && df -k /dev/shm"
    out = desk.run("shell", "-c", script)
    assert "Read-only file system" in out and " 1048576 " in out  # KiB of shared memory
    assert not (desk.folder / "tree" / "new").exists()


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_training(number, status, converted, desk):
    output = f"out-{status}"
    process = desk.start("imagenet_train.py", *QUICK, env={"output": output})
    seen = ""
    while "img/s" not in seen and (more := process.stdout.read(1)):
        seen += more
    process.send_signal(number)
    out, _ = process.communicate()
    assert process.returncode == status, (seen + out)[-2000:]
    assert "Traceback" not in out
    if number == signal.SIGTERM:
        assert list((desk.folder / output).rglob("last.ckpt"))


def test_interrupt_key_of_a_terminal(desk):
    leader, terminal = pty.openpty()
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), terminal)
    try:
        process = desk.start("shell", "-c", "echo ready; exec sleep 1000", start_new_session=True, **streams)
        seen = b""
        while b"ready" not in seen:
            seen += os.read(leader, 1000)
        os.write(leader, b"\x03")
        assert process.wait() == 130
    finally:
        os.close(leader)
        os.close(terminal)


def test_serve(converted, desk):
    script = f". '{TOP}/config.sh'; printf %s \"$nginx\""
    web = subprocess.run(["bash", "-uc", script], capture_output=True, text=True, check=True).stdout
    find = [ENGINE, "image", "inspect", web], [ENGINE, "pull", web]
    if all(subprocess.run(command, capture_output=True).returncode for command in find):
        pytest.skip(f"{web}: no such image, and no registry to pull it from")
    port, served = places.free_port(), b""
    process = desk.start("serve", env={"port": f"127.0.0.1:{port}", "nginx": web})
    while not served and process.poll() is None:
        try:
            served = urllib.request.urlopen(f"http://127.0.0.1:{port}/imagenet-train-000000.tar").read()
        except OSError:
            time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate()
    assert served == (converted / "imagenet-train-000000.tar").read_bytes(), out
    assert process.returncode == 0
