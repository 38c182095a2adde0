"""The small files around the scripts: Dockerfile, run, config.sh, train.yml and what they promise."""

import json
import os
import pty
import re
import shlex
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

TOP = Path(__file__).parent.parent
TOOLS = Path(sys.executable).parent  # where pip puts the linters
DEMO, CONTAINER = ["help", "demo", "test"], ["build", "imagenet_shards.py", "imagenet_train.py", "shell", "serve"]
SETTINGS = ("imagenet", "shards", "output", "image", "engine", "shm", "nginx", "port", "python")


def call(*command: str, cwd: Path = TOP, stdin=subprocess.DEVNULL, **env: str) -> subprocess.CompletedProcess:
    """Run a command to its end; `env` is added to an environment without the settings of config.sh."""
    clean = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    return subprocess.run(command, cwd=cwd, env=clean | env, stdin=stdin, capture_output=True, text=True)


def refused(done: subprocess.CompletedProcess) -> str:
    """The one line with which ./run refused."""
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and len(lines) == 1 and lines[0].startswith("run: "), done
    return lines[0]


# ---------------------------------------------------------------- all of them


@pytest.mark.parametrize(
    "command",
    ["shellcheck --external-sources run config.sh .ci/run", "hadolint Dockerfile"]
    + ["yamllint --strict -d '{extends: relaxed, rules: {line-length: {max: 120}}}' train.yml"],
)
def test_linters_find_nothing(command):
    done = call(*shlex.split(command), PATH=f"{TOOLS}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stdout + done.stderr


def test_top_level_holds_what_was_agreed_and_nothing_else():
    listed = call("git", "ls-files", "--cached", "--others", "--exclude-standard")
    assert listed.returncode == 0, listed.stderr
    top = {path.split("/")[0] for path in listed.stdout.splitlines() if not path.startswith(".")}
    files = "imagenet_shards.py imagenet_train.py requirements.txt Dockerfile run config.sh train.yml tests README.md"
    assert top == set(files.split())


def test_requirements_are_six_packages():
    names = re.findall(r"^[A-Za-z-]+", (TOP / "requirements.txt").read_text(), re.MULTILINE)
    assert names == ["webdataset", "torch", "torchvision", "pytorch-lightning", "Pillow", "tqdm"]


# ---------------------------------------------------------------- Dockerfile, .dockerignore


def instructions() -> list[list[str]]:
    """[instruction, rest] of every line of the Dockerfile, continued lines joined."""
    text = re.sub(r"^#.*\n", "", (TOP / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", "")
    return [line.split(" ", 1) for line in text.splitlines() if line]


def test_only_what_the_image_holds_is_sent_to_the_engine():
    copied = {name for kind, rest in instructions() if kind == "COPY" for name in rest.split()[:-1]}
    patterns = [line for line in (TOP / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert patterns == ["*", "!requirements.txt", "!imagenet_shards.py", "!imagenet_train.py"]
    assert {f"!{name}" for name in copied} == set(patterns[1:])


def test_image_is_ordered_for_the_build_cache_and_runs_as_nobody_special():
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


def test_help_lists_every_command():
    done = call("./run", "help")
    assert done.returncode == 0 and done.stderr == ""
    assert re.findall(r"^  \./run (\S+) +\S", done.stdout, re.MULTILINE) == DEMO + CONTAINER
    assert call("./run").stdout == call("./run", "--help").stdout == done.stdout
    assert done.stdout.count("\n") == len(DEMO + CONTAINER)


@pytest.mark.parametrize("command", ["bogus", "venv", "fail", "container", ".*", "-x", "ls"])
def test_what_is_no_command_is_refused_in_one_line(command):
    assert refused(call("./run", command)) == f"run: {command}: no such command; ./run help lists them"


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_has_a_default_and_the_environment_overrides_it(name):
    show = f'set -eu; . "$1"; printf %s "${name}"'
    assert call("bash", "-c", show, "-", f"{TOP}/config.sh").stdout
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
            '  info) exit "${info:-0}" ;;\n'
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


def test_verify_is_given_no_imagenet(engine):
    _, run = engine
    _, given = run("imagenet_shards.py", "--verify", "--decode", imagenet="nowhere")
    assert given[-4:] == ["imagenet_shards.py", "--shards=/data", "--verify", "--decode"]


def test_podman_keeps_the_caller_who_is_not_root(engine):
    folder, run = engine
    (folder / "bin" / "id").write_text("#!/bin/sh\necho 1234\n")
    (folder / "bin" / "id").chmod(0o755)
    assert {"--userns=keep-id", "--group-add=keep-groups", "--user=1234:1234"} <= set(run("shell", engine="podman")[1])


def test_training_gets_a_place_for_its_output_and_the_gpus_there_are(engine):
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


def test_what_is_missing_is_named_in_one_line(engine):
    folder, run = engine
    assert f"{folder}/nowhere: no such folder" in refused(run("imagenet_shards.py", imagenet="nowhere")[0])
    assert f"{folder}/nowhere: no such folder" in refused(run("serve", shards="nowhere")[0])
    (folder / "a:b").mkdir()
    assert f"{folder}/a:b: the engines mount no name with a colon" in refused(run("serve", shards="a:b")[0])
    assert f"{folder}/nowhere: no such folder" in refused(run("imagenet_train.py", shards="nowhere")[0])
    assert run("imagenet_train.py", "--shards=http://host/", shards="nowhere")[1][-1] == "--shards=http://host/"
    assert "x: no such image; ./run build makes it" in refused(run("shell", image="x", missing="1")[0])


# ---------------------------------------------------------------- train.yml


def render(image: str = "registry/x:1", shards: str = "http://host/data/", nodes: int = 1) -> list[dict]:
    """The documents of train.yml as its first line makes them, the number of nodes edited as it says."""
    text = (TOP / "train.yml").read_text()
    edited, places = re.subn(r"^(  parallelism: &nodes )1$", rf"\g<1>{nodes}", text, flags=re.MULTILINE)
    assert places == 1
    done = subprocess.run(["envsubst"], input=edited, env=os.environ | {"image": image, "shards": shards},
                          capture_output=True, text=True, check=True)
    return list(yaml.safe_load_all(done.stdout))


def environment(job: dict, index: int) -> dict[str, str]:
    """What Kubernetes sets in the training container of one pod."""
    pod = job["spec"]["template"]["spec"]
    limits = {c["name"]: c["resources"]["limits"] for c in pod["initContainers"] + pod["containers"]}
    env = {"JOB_COMPLETION_INDEX": str(index)}
    for entry in pod["containers"][0]["env"]:
        if "value" in entry:
            env[entry["name"]] = entry["value"]
        else:
            source = entry["valueFrom"]["resourceFieldRef"]
            env[entry["name"]] = str(limits[source["containerName"]][source["resource"].removeprefix("limits.")])
    return env


def command_line(job: dict, index: int = 0) -> list[str]:
    """The training container's command and arguments, each $(NAME) replaced as Kubernetes does."""
    container = job["spec"]["template"]["spec"]["containers"][0]
    env = environment(job, index)
    words = container["command"] + container["args"]
    return [re.sub(r"\$\((\w+)\)", lambda match: env.get(match[1], match[0]), word) for word in words]


def test_envsubst_replaces_the_image_and_the_shards_and_eats_nothing_else():
    text = (TOP / "train.yml").read_text()
    done = call("envsubst", "--variables", text)
    assert done.returncode == 0 and set(done.stdout.split()) == {"image", "shards"}
    assert text.startswith("# image=… shards=… envsubst < ./train.yml | kubectl apply -f -\n")


@pytest.mark.parametrize(
    "shards",
    ["pipe:gsutil cat gs://bucket/%s", "http://host/a b/", "pipe:curl -s http://localhost:8080/",
     """pipe:sh -c 'cat "/data/%s" # {x}: [y] & *z \\n'"""],
)
def test_values_arrive_as_they_are(shards):
    job = render("registry/x:1@sha256:00", shards)[2]
    assert f"--shards={shards}" in command_line(job)
    pod = job["spec"]["template"]["spec"]
    assert {c["image"] for c in pod["containers"] + pod["initContainers"]} == {"registry/x:1@sha256:00"}


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
    names += [thing["name"] for thing in pod["containers"] + pod["initContainers"] + pod["volumes"]]
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
    assert f"--rdzv-endpoint={first}:{service['spec']['ports'][0]['port']}" in command_line(job)
    assert first in pod["initContainers"][0]["command"][-1]


@pytest.mark.parametrize("nodes", [1, 2, 64])
def test_one_number_makes_it_many_nodes(nodes):
    job = render(nodes=nodes)[2]
    assert job["spec"]["completionMode"] == "Indexed"
    assert job["spec"]["parallelism"] == job["spec"]["completions"] == nodes
    for index in range(nodes):
        assert command_line(job, index)[:2] == ["torchrun", f"--nnodes={nodes}"]


def test_any_pod_may_be_lost_many_times():
    job = render(nodes=64)[2]["spec"]
    assert job["backoffLimitPerIndex"] == 100 and "backoffLimit" not in job  # which 64 pods would use up at once
    assert job["successPolicy"] == {"rules": [{"succeededCount": 1}]}  # who comes back when others are through waits
    ignored = [condition for rule in job["podFailurePolicy"]["rules"] for condition in rule["onPodConditions"]]
    assert ignored == [{"type": "DisruptionTarget", "status": "True"}]
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    assert environment({"spec": job}, 0)["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"  # test_cluster needs it


def test_arguments_are_those_of_torchrun_and_the_script():
    from torch.distributed.run import get_args_parser

    import imagenet_train

    launch = get_args_parser().parse_args(command_line(render(shards="http://host/a b/", nodes=2)[2])[1:])
    assert (launch.nnodes, launch.nproc_per_node, launch.rdzv_backend) == ("2", "gpu", "c10d")
    assert launch.training_script == "/app/imagenet_train.py"  # where the Dockerfile puts it
    assert dict(instructions())["WORKDIR"] == "/app"
    args = imagenet_train.parse_args(launch.training_script_args)
    assert (args.shards, args.output, args.resume) == ("http://host/a b/", Path("/output"), "")
    assert args.workers and args.checkpoint_every and args.devices == "auto"


def test_pods_may_do_little_and_get_time_to_save():
    pod = render()[2]["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in pod["containers"] + pod["initContainers"]:
        rights = container["securityContext"]
        assert rights["allowPrivilegeEscalation"] is False and rights["readOnlyRootFilesystem"] is True
        assert rights["capabilities"] == {"drop": ["ALL"]}
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys() & container["resources"]["limits"].keys()
    assert "nvidia.com/gpu" in pod["containers"][0]["resources"]["limits"]
    shutdown = int(environment(render()[2], 0)["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    assert 30 <= shutdown < pod["terminationGracePeriodSeconds"]
