"""The small files around the scripts: Dockerfile, constraints.txt, run, config.sh, train.yml and what they do."""

import importlib.metadata
import json
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
from manifest import SETTINGS, TOP, command_line, environment, render
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

TOOLS = Path(sys.executable).parent  # where pip puts the linters
DEMO, CONTAINER = ["help", "demo", "test"], ["build", "imagenet_shards.py", "imagenet_train.py", "shell", "serve"]


def call(*command: str, cwd: Path = TOP, stdin=subprocess.DEVNULL, **env: str) -> subprocess.CompletedProcess:
    """Run a command to its end; `env` is added to an environment without the settings of config.sh."""
    clean = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    return subprocess.run(command, cwd=cwd, env=clean | env, stdin=stdin, capture_output=True, text=True)


def refused(done: subprocess.CompletedProcess) -> str:
    """The one line with which ./run refused."""
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and len(lines) == 1 and lines[0].startswith("run: "), done
    return lines[0]


# ---------------------------------------------------------------- all files


@pytest.mark.quick
@pytest.mark.parametrize(
    "command",
    ["shellcheck --external-sources run config.sh .ci/run", "hadolint Dockerfile", "ruff check .", "mypy"]
    + ["yamllint --strict -d '{extends: relaxed, rules: {line-length: {max: 120}}}' train.yml"],
)
def test_linters_report_nothing(command):
    done = call(*shlex.split(command), PATH=f"{TOOLS}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.quick
def test_top_level_has_only_the_agreed_files():
    listed = call("git", "ls-files", "--cached", "--others", "--exclude-standard")
    assert listed.returncode == 0, listed.stderr
    top = {path.split("/")[0] for path in listed.stdout.splitlines() if not path.startswith(".")}
    files = "imagenet_shards.py imagenet_train.py requirements.txt Dockerfile run config.sh train.yml tests README.md"
    assert top == set(files.split())


def test_requirements_are_six_packages():
    names = re.findall(r"^[A-Za-z-]+", (TOP / "requirements.txt").read_text(), re.MULTILINE)
    assert names == ["webdataset", "torch", "torchvision", "pytorch-lightning", "Pillow", "tqdm"]


def requirements(name: str) -> list[Requirement]:
    """The lines of a requirements or constraints file that apply to this Python."""
    lines = [line.split("#")[0].strip() for line in (TOP / name).read_text().splitlines()]
    return [r for r in map(Requirement, filter(None, lines)) if not r.marker or r.marker.evaluate()]


def installed(wanted: list[Requirement]) -> dict[str, str]:
    """The installed versions of these packages and of all that they require."""
    versions, seen = {}, set()
    while wanted:
        requirement = wanted.pop()
        name = canonicalize_name(requirement.name)
        versions[name] = importlib.metadata.version(name).split("+")[0]  # 2.14.1+cpu is 2.14.1 as well
        for extra in {"", *requirement.extras}:
            if (name, extra) not in seen:
                seen.add((name, extra))
                needed = map(Requirement, importlib.metadata.requires(name) or [])
                wanted += [r for r in needed if not r.marker or r.marker.evaluate({"extra": extra})]
    return versions


def test_constraints_pin_every_package_that_the_requirements_install():
    """Made by the command in the file's first lines; to be repeated when a requirement changes."""
    wanted = requirements("requirements.txt") + requirements("tests/requirements.txt")
    pins = {canonicalize_name(pin.name): str(pin.specifier)[2:] for pin in requirements("tests/constraints.txt")}
    assert all(requirement.specifier.contains(pins[canonicalize_name(requirement.name)]) for requirement in wanted)
    versions = installed(wanted)
    assert not versions.keys() - pins.keys()
    if "CI" in os.environ:  # elsewhere the newest versions may be installed
        assert versions == {name: pins[name] for name in versions}


# ---------------------------------------------------------------- Dockerfile, .dockerignore


def instructions() -> list[list[str]]:
    """[instruction, rest] of every line of the Dockerfile, continued lines joined."""
    text = re.sub(r"^#.*\n", "", (TOP / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", "")
    return [line.split(" ", 1) for line in text.splitlines() if line]


def test_only_what_the_image_holds_is_sent_to_the_engine():
    copied = {name for kind, rest in instructions() if kind == "COPY" for name in rest.split()[:-1]}
    patterns = [line for line in (TOP / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert patterns[0] == "*" and {f"!{name}" for name in copied} == set(patterns[1:])


def test_image_is_ordered_for_the_build_cache_and_runs_as_an_unprivileged_user():
    text = (TOP / "Dockerfile").read_text()
    assert "# syntax" not in text and "<<" not in text  # older builders know neither
    kinds = [f"{kind} {rest}" for kind, rest in instructions()]
    assert kinds[:2] == ["ARG base=docker.io/library/python:3.12-slim", "FROM ${base}"]
    places = [next(i for i, line in enumerate(kinds) if part in line) for part in
              ("apt-get", "COPY requirements.txt", "pip install", "COPY imagenet_shards.py", "USER 1000")]
    assert places == sorted(places)
    assert kinds[places[-1]] == "USER 1000:1000"  # numbers: runAsNonRoot can't tell who a name is


@pytest.mark.parametrize(
    "command, expected",
    [(["imagenet_train.py", "--shards=a b"], ["python", "imagenet_train.py", "--shards=a b"]),
     (["torchrun", "imagenet_train.py", "$HOME *"], ["torchrun", "imagenet_train.py", "$HOME *"])],
)
def test_entrypoint_runs_scripts_and_commands(command, expected, tmp_path):
    for name in ("python", "torchrun"):
        (tmp_path / name).write_text("#!/bin/sh\nprintf '%s\\n' \"${0##*/}\" \"$@\"\nexit 7\n")
        (tmp_path / name).chmod(0o755)
    entrypoint = json.loads(dict(instructions())["ENTRYPOINT"])
    done = call(*entrypoint, *command, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert (done.stdout.splitlines(), done.returncode) == (expected, 7), done.stderr


# ---------------------------------------------------------------- run, config.sh


@pytest.mark.quick
def test_help_lists_every_command():
    done = call("./run", "help")
    assert done.returncode == 0 and done.stderr == ""
    assert re.findall(r"^  \./run (\S+) +\S", done.stdout, re.MULTILINE) == DEMO + CONTAINER
    assert call("./run").stdout == call("./run", "--help").stdout == done.stdout
    assert done.stdout.count("\n") == len(DEMO + CONTAINER)


@pytest.mark.parametrize("command", ["bogus", "venv", "fail", "container", ".*", "-x", "ls"])
def test_an_unknown_command_is_refused_in_one_line(command):
    assert refused(call("./run", command)) == f"run: {command}: no such command; ./run help lists them"


def test_pytest_gets_the_arguments_of_test_on_machines_without_nproc(tmp_path):
    """As on macOS. The virtual environment is a stand-in in which all requirements are installed."""
    (tmp_path / "tests").mkdir()
    for name in ("run", "config.sh", "requirements.txt", "tests/requirements.txt"):
        shutil.copy(TOP / name, tmp_path / name)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("requirements.txt", "tests/requirements.txt"):
        shutil.copy(TOP / name, tmp_path / ".venv" / f"installed-{name.replace('/', '-')}")
    for name in ("pip", "python"):
        (tmp_path / ".venv" / "bin" / name).write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\nexit 3\n")
        (tmp_path / ".venv" / "bin" / name).chmod(0o755)
    (tmp_path / "bin").mkdir()
    for name in ("bash", "cmp", "cut", "dirname", "grep", "sed"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    done = call(f"{tmp_path}/run", "test", "-m", "quick", "-k", "a b", PATH=f"{tmp_path}/bin", python=sys.executable)
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout.splitlines() == ["-m", "pytest", "-n", "auto", "--dist", "worksteal", "-m", "quick", "-k", "a b"]


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_has_a_default_and_the_environment_overrides_it(name):
    show = f'set -eu; . "$1"; printf %s "${name}"'
    done = call("bash", "-c", show, "-", f"{TOP}/config.sh")
    assert done.returncode == 0 and (done.stdout or name == "credentials")
    assert call("bash", "-c", show, "-", f"{TOP}/config.sh", **{name: "a b"}).stdout == "a b"


@pytest.fixture
def engine(tmp_path):
    """A stand-in for docker and podman: its folder, and ./run with it, which returns too what the engine was given.

    There is a folder tree for ImageNet and one with a space for the shards; both are named relative to the caller.
    """
    (tmp_path / "bin").mkdir()
    for name in ("docker", "podman"):
        (tmp_path / "bin" / name).write_text(
            '#!/bin/sh\n'
            'case $1 in\n'
            '  info) echo "$security"; exit "${info:-0}" ;;\n'
            '  image) exit "${missing:-0}" ;;\n'
            '  *) printf "%s\\0" "$@" >"$record"; exit "${status:-0}" ;;\n'
            'esac\n'
        )
        (tmp_path / "bin" / name).chmod(0o755)
    for folder in ("tree", "my shards"):
        (tmp_path / folder).mkdir()

    def run(*arguments: str, **env: str) -> tuple[subprocess.CompletedProcess, list[str]]:
        record = tmp_path / "record"
        record.unlink(missing_ok=True)
        env = {"imagenet": "tree", "shards": "my shards", "output": f"{tmp_path}/out"} | env
        path = f"{tmp_path}/bin:{os.environ['PATH']}"
        done = call(f"{TOP}/run", *arguments, cwd=tmp_path, PATH=path, record=str(record), **env)
        return done, record.read_text().split("\0")[:-1] if record.exists() else []

    return tmp_path, run


def test_container_gets_folders_user_memory_and_arguments_as_given(engine):
    folder, run = engine
    done, given = run("imagenet_shards.py", "--splits=val", "a b", "*", "", shm="3g", image="x/y:1", status="42")
    assert done.returncode == 42, done.stderr
    place = given.index("x/y:1")
    script = ["imagenet_shards.py", "--imagenet=/imagenet", "--shards=/data"]
    assert given[place + 1 :] == [*script, "--splits=val", "a b", "*", ""]
    assert given[0] == "run"
    options = given[1:place]
    assert {"--rm", "--init", "--network=host", "--shm-size=3g", f"--user={os.getuid()}:{os.getgid()}"} <= set(options)
    assert {f"--group-add={group}" for group in [os.getgid(), *os.getgroups()]} <= set(options)
    volumes = {option.removeprefix("--volume=") for option in options if option.startswith("--volume=")}
    assert volumes == {f"{folder}/tree:/imagenet:ro", f"{folder}/my shards:/data"}
    assert "--tty" not in options and "--interactive" not in options


@pytest.mark.parametrize("task", ["--verify", "--index-only"])
def test_what_reads_shards_is_given_no_imagenet(engine, task):
    _, run = engine
    _, given = run("imagenet_shards.py", task, "--decode", imagenet="nowhere")
    assert given[-4:] == ["imagenet_shards.py", "--shards=/data", task, "--decode"]


def test_a_conversion_into_a_bucket_is_recorded_in_the_mounted_folder(engine):
    folder, run = engine
    for flags in (["--shards=pipe:store %s"], ["--shards", "pipe:store %s", "--record=/data/mine"]):
        done, given = run("imagenet_shards.py", *flags, shards="new")
        assert done.returncode == 0 and f"--volume={folder}/new:/data" in given
        assert given[-len(flags) - 4 :] == [
            "imagenet_shards.py", "--imagenet=/imagenet", "--shards=/data", "--record=/data", *flags
        ]
    assert "--record=/data" not in run("imagenet_shards.py", "--shards=/data/small")[1]


def test_containers_get_the_credentials_that_are_named_and_no_others(engine):
    folder, run = engine
    for name in ("home/.boto", "home/.aws/credentials", "key.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    home, named = f"{folder}/home", f"{folder}/home/.boto {folder}/home/.aws TOKEN {folder}/key.json"
    for command in ("imagenet_shards.py", "imagenet_train.py", "shell"):
        given = run(command, HOME=home, TOKEN="secret", credentials=named)[1]
        volumes = {option.removeprefix("--volume=") for option in given if option.startswith("--volume=")}
        assert {f"{home}/.boto:{home}/.boto:ro", f"{home}/.boto:/tmp/.boto:ro", f"{home}/.aws:/tmp/.aws:ro"} <= volumes
        assert f"{folder}/key.json:{folder}/key.json:ro" in volumes
        assert "--env=TOKEN" in given and not any("secret" in word for word in given)  # others see the command line
    plain = run("shell", HOME=home, TOKEN="secret")[1]
    assert not any("--env" in option or ".boto" in option or "key.json" in option for option in plain)
    assert f"credentials: {folder}/no.json: no such file" in refused(run("shell", credentials=f"{folder}/no.json")[0])
    assert "credentials: key.json: no such environment variable" in refused(run("shell", credentials="key.json")[0])


def test_in_rootless_docker_the_caller_is_root(engine):
    folder, run = engine
    given = run("shell", security=" Security Options:\n  seccomp\n   Profile: builtin\n  rootless\n  cgroupns")[1]
    assert [option for option in given if option.startswith(("--user", "--group-add"))] == ["--user=0:0"]


def test_podman_runs_as_the_caller_if_that_is_not_root(engine):
    folder, run = engine
    (folder / "bin" / "id").write_text("#!/bin/sh\necho 1234\n")
    (folder / "bin" / "id").chmod(0o755)
    assert {"--userns=keep-id", "--group-add=keep-groups", "--user=1234:1234"} <= set(run("shell", engine="podman")[1])


def test_training_gets_an_output_folder_and_all_gpus(engine):
    folder, run = engine
    _, plain = run("imagenet_train.py", "--devices=2")
    assert plain[-4:] == ["imagenet_train.py", "--shards=/data", "--output=/output", "--devices=2"]
    assert f"--volume={folder}/out:/output" in plain and (folder / "out").is_dir()
    (folder / "bin" / "nvidia-smi").write_text("#!/bin/sh\n")
    (folder / "bin" / "nvidia-smi").chmod(0o755)
    assert "--gpus=all" in run("imagenet_train.py")[1]
    assert "--device=nvidia.com/gpu=all" in run("imagenet_train.py", engine="podman")[1]
    assert not any("gpu" in option for option in run("imagenet_shards.py")[1])


def test_a_terminal_is_passed_on(engine):
    folder, _ = engine
    leader, terminal = pty.openpty()
    env = os.environ | {"PATH": f"{folder}/bin:{os.environ['PATH']}", "record": f"{folder}/record", "engine": "docker"}
    try:
        subprocess.run([f"{TOP}/run", "shell"], env=env, stdin=terminal, stdout=terminal, check=True)
    finally:
        os.close(leader)
        os.close(terminal)
    given = (folder / "record").read_text().split("\0")[:-1]
    assert {"--interactive", "--tty"} <= set(given) and given[-1] == "bash"


def test_serve_and_build(engine):
    folder, run = engine
    done, given = run("serve", port="127.0.0.1:8081", nginx="web:1", status="3")
    assert done.returncode == 3 and "http://localhost:8081/" in done.stdout
    mount = f"--volume={folder}/my shards:/usr/share/nginx/html:ro"
    assert given == ["run", "--rm", mount, "--publish=127.0.0.1:8081:80", "web:1"]
    _, given = run("build", "--build-arg", "tools=a b", image="x")
    assert given == ["build", "--tag", "x", "--build-arg", "tools=a b", "."]


@pytest.mark.parametrize("command", CONTAINER)
def test_without_an_engine_every_container_command_says_so_in_one_line(command, engine):
    _, run = engine
    assert "no-such-engine: not installed" in refused(run(command, engine="no-such-engine")[0])
    assert "docker: does not answer" in refused(run(command, info="1")[0])


def test_missing_inputs_are_named_in_one_line(engine):
    folder, run = engine
    assert f"{folder}/nowhere: no such folder" in refused(run("imagenet_shards.py", imagenet="nowhere")[0])
    assert f"{folder}/nowhere: no such folder" in refused(run("serve", shards="nowhere")[0])
    (folder / "a:b").mkdir()
    assert f"{folder}/a:b: container engines cannot mount a path with a colon" in refused(run("serve", shards="a:b")[0])
    assert f"{folder}/nowhere: no such folder" in refused(run("imagenet_train.py", shards="nowhere")[0])
    assert run("imagenet_train.py", "--shards=http://host/", shards="nowhere")[1][-1] == "--shards=http://host/"
    assert "x: no such image; build it with ./run build" in refused(run("shell", image="x", missing="1")[0])


# ---------------------------------------------------------------- train.yml


def launch(job: dict, index: int, folder: Path) -> subprocess.CompletedProcess:
    """Run a pod's command with a torchrun that prints its arguments, and names that are known."""
    scripts = {"torchrun": 'printf "%s\\0" "$@"', "getent": 'echo "10.0.0.1 $2"', "hostname": "echo host"}
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    env = environment(job, index) | {"HOME": str(folder), "PATH": f"{folder}:{os.environ['PATH']}"}
    return call(*command_line(job, index), **env)


def test_envsubst_replaces_the_image_and_the_shards_only():
    text = (TOP / "train.yml").read_text()
    done = call("envsubst", "--variables", text)
    assert done.returncode == 0 and set(done.stdout.split()) == {"image", "shards"}
    assert text.startswith("# image=… shards=… envsubst < ./train.yml | kubectl apply -f -\n")


@pytest.mark.parametrize(
    "shards",
    ["pipe:gsutil cat gs://bucket/%s", "http://host/a b/", "pipe:curl -s http://localhost:8080/",
     """pipe:sh -c 'cat "/data/%s" # {x}: [y] & *z \\n'"""],
)
def test_image_and_shards_are_passed_unchanged(shards):
    job = render("registry/x:1@sha256:00", shards)[2]
    assert f"--shards={shards}" in command_line(job)
    pod = job["spec"]["template"]["spec"]
    assert [container["image"] for container in pod["containers"]] == ["registry/x:1@sha256:00"]


@pytest.mark.parametrize("version", ["1.31", kubernetes_validate.latest_version()])
def test_documents_are_valid_for_kubernetes(version):
    documents = render(nodes=3)
    assert [document["kind"] for document in documents] == ["Service", "PersistentVolumeClaim", "Job"]
    for document in documents:
        kubernetes_validate.validate(document, version, strict=True)


def test_documents_fit_together():
    service, claim, job = render()
    template = job["spec"]["template"]
    pod = template["spec"]
    ports = [port["name"] for port in service["spec"]["ports"]]
    names = [d["metadata"]["name"] for d in (service, claim, job)] + ports
    names += [thing["name"] for thing in pod["containers"] + pod["volumes"]]
    assert all(re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", name) for name in names)
    volumes = {volume["name"] for volume in pod["volumes"]}
    mounts = [mount for container in pod["containers"] for mount in container["volumeMounts"]]
    assert {mount["name"] for mount in mounts} == volumes
    assert {"/output", "/dev/shm", "/tmp"} == {mount["mountPath"] for mount in mounts}
    claims = [v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v]
    assert claims == [claim["metadata"]["name"]]
    assert {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}} in pod["volumes"]

    assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"] is True
    assert pod["subdomain"] == service["metadata"]["name"]
    first = f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    words = command_line(job)
    assert f"--rdzv-endpoint={first}:{service['spec']['ports'][0]['port']}" in words and first in words[2]


@pytest.mark.parametrize("nodes", [1, 2, 64])
def test_torchrun_waits_for_as_many_pods_as_the_job_makes(nodes, tmp_path):
    job = render(nodes=nodes)[2]
    assert job["spec"]["completionMode"] == "Indexed"
    assert job["spec"]["parallelism"] == job["spec"]["completions"] == nodes
    for index in {0, nodes - 1}:
        done = launch(job, index, tmp_path)
        assert done.returncode == 0 and done.stdout.split("\0")[0] == f"--nnodes={nodes}", done.stderr


def test_two_numbers_of_nodes_that_differ_are_noticed(tmp_path):
    """Too many pods: the extra one fails the Job. Too few: the API refuses a succeededIndexes beyond completions."""
    job = render(nodes=3, last=1)[2]
    assert launch(job, 1, tmp_path).returncode == 0
    done = launch(job, 2, tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "succeededIndexes: 1 is too small; set it to parallelism - 1" in done.stderr
    fail = [rule["onExitCodes"] for rule in job["spec"]["podFailurePolicy"]["rules"] if rule["action"] == "FailJob"]
    assert fail == [{"containerName": "train", "operator": "In", "values": [done.returncode]}]
    job = render(nodes=1, last=3)[2]
    checked = [rule["succeededIndexes"] for rule in job["spec"]["successPolicy"]["rules"] if "succeededIndexes" in rule]
    assert checked == [environment(job, 0)["LAST"]] == ["3"]  # torchrun's number is the one that the API checks


def test_without_an_image_the_api_refuses_the_job():
    containers = render(image="")[2]["spec"]["template"]["spec"]["containers"]
    assert [container["image"] for container in containers] == [None]


def test_arguments_are_those_of_torchrun_and_the_script(tmp_path):
    from torch.distributed.run import get_args_parser

    import imagenet_train

    words = launch(render(shards="http://host/a b/", nodes=2)[2], 0, tmp_path).stdout.split("\0")[:-1]
    run = get_args_parser().parse_args(words)
    assert (run.nnodes, run.nproc_per_node, run.rdzv_backend) == ("2", "gpu", "c10d")
    assert run.training_script == f"{dict(instructions())['WORKDIR']}/imagenet_train.py"
    args = imagenet_train.parse_args(run.training_script_args)
    assert (args.shards, args.output) == ("http://host/a b/", Path("/output"))
    assert args.resume is not None and args.checkpoint_every


def test_pods_meet_the_restricted_pod_security_standard():
    """What a namespace with pod-security.kubernetes.io/enforce: restricted asks for; and no access to the API."""
    pod = render()[2]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] != 0
    assert pod["securityContext"]["seccompProfile"]["type"] in ("RuntimeDefault", "Localhost")
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    allowed = set("configMap csi downwardAPI emptyDir ephemeral persistentVolumeClaim projected secret".split())
    assert {kind for volume in pod["volumes"] for kind in volume.keys() - {"name"}} <= allowed
    for container in pod["containers"]:
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]
    assert pod["automountServiceAccountToken"] is False


def test_pods_get_time_to_save_before_they_are_killed():
    job = render()[2]
    shutdown = int(environment(job, 0)["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    assert 30 <= shutdown < job["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
