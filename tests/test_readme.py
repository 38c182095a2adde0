"""Every command of the README, executed as it stands, or the reason why not."""

import os
import re
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import places
import pytest
from PIL import Image
from training import SMALL

TOP = Path(__file__).parent.parent
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", (TOP / "README.md").read_text(), re.DOTALL)
    for line in block.splitlines()
]
# Only where ImageNet lies, and which port is free, is put in; and so that it takes seconds, these flags go first.
QUICK = " ".join([*SMALL, "--max-epochs=1", "--workers=1"])
TREE, SERVER = "/data/imagenet", "http://localhost:8080/"
ELSEWHERE = {
    "./run demo": "test_demo below",
    "./run test": "this is it",
    "pip install -r requirements.txt": "./run does it",
    'docker run --rm -p 8080:80 -v "$PWD/data:/usr/share/nginx/html:ro" nginx':
    "needs a container engine and its registry; below, an nginx without a container serves the same folder",
    "torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=first-host:29500 imagenet_train.py "
    "--shards=./data": "needs two machines; test_run_cluster runs torchrun on two hosts",
    "srun --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 python imagenet_train.py --shards=./data --num-nodes=2 "
    "--devices=8": "needs Slurm and 16 GPUs",
    "./run build": "test_run_container does it, where a container engine answers",
    "./run imagenet_shards.py": "test_run_container does it, where a container engine answers",
    "./run imagenet_train.py": "test_run_container does it, where a container engine answers",
    "image=registry/imagenet shards='pipe:gsutil cat gs://bucket/%s' envsubst < ./train.yml | kubectl apply -f -":
    "needs a cluster; test_run_cluster runs what it makes",
}
HERE = [command for command in COMMANDS if command not in ELSEWHERE]
PARTS = [command for command in HERE if "--part=" in command or "--index-only" in command]  # executed together
# What writes into a bucket, and what reads from it.
BACK = {
    "gsutil cp - gs://bucket/%s": "gsutil cat gs://bucket/%s",
    "aws s3 cp - s3://bucket/%s": "aws s3 cp s3://bucket/%s -",
}


def test_every_command_is_executed_or_has_a_reason():
    assert set(ELSEWHERE) <= set(COMMANDS)
    assert len(HERE) >= 8 and all(command.startswith("python imagenet_") for command in HERE)


@pytest.fixture(scope="module")
def desk(tree, tmp_path_factory) -> Path:
    """A folder as a user has it: both scripts, `python` on the PATH, and the shards that the first command makes."""
    folder = tmp_path_factory.mktemp("desk")
    for name in ("imagenet_shards.py", "imagenet_train.py"):
        shutil.copy(TOP / name, folder)
    (folder / "bin").mkdir()
    (folder / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (folder / "bin" / "python").chmod(0o755)
    execute(folder, HERE[0], tree)
    return folder


def execute(folder: Path, command: str, tree: Path, server: str = SERVER, **env: str) -> str:
    command = command.replace(TREE, str(tree)).replace(SERVER, server)
    command = command.replace("/tmp/imagenet-cache", f"{folder}/cache")
    command = command.replace("imagenet_train.py", f"imagenet_train.py {QUICK}")
    env = os.environ | {"OMP_NUM_THREADS": "1"} | env
    env["PATH"] = f"{folder}/bin:{env['PATH']}"
    run = subprocess.run(["bash", "-c", command], cwd=folder, env=env, capture_output=True, text=True, timeout=800)
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


@pytest.mark.parametrize("command", [command for command in HERE if command not in PARTS])
def test_a_command_as_it_stands(desk, tree, tmp_path, command):
    shutil.rmtree(desk / "output", ignore_errors=True)
    write = next((words for words in BACK if words in command), None)
    server, env = SERVER, {}
    with ExitStack() as stack:
        if SERVER in command:
            server = stack.enter_context(places.nginx(desk / "data"))
        elif "//bucket/" in command:
            (tmp_path / "bucket").mkdir()
            if not write:
                shutil.copytree(desk / "data", tmp_path / "bucket", dirs_exist_ok=True)
            serve = places.gcs(tmp_path) if "gs://" in command else places.s3("bucket", tmp_path / "bucket")
            env = stack.enter_context(serve)
        out = execute(desk, command, tree, server, **env)
        if write:
            back = execute(desk, f"python imagenet_shards.py --verify --shards='pipe:{BACK[write]}'", tree, **env)
            assert back.count("all as the index says") == 2
    if "--preview" in command:
        assert Image.open(desk / "preview.png").width > 100
    elif "limit.py" in command:
        results = re.findall("^(loader alone|step alone|both together) +[0-9,.]+ images/s", out, re.MULTILINE)
        assert len(results) == 3 and re.search("^(step|input)-bound: ", out, re.MULTILINE)
    elif "imagenet_train" in command:
        assert "validated 30/30 images" in out and (desk / "output" / "version_0" / "last.ckpt").exists()
    elif "--verify" in command:
        assert out.count("all as the index says") == 2
    else:
        assert "1 shards, 60 images" in out and "1 shards, 30 images" in out


def test_parts_make_the_same_shards(desk, tree):
    for command in PARTS:
        execute(desk, command.replace("./data", "./parts"), tree)
    made, whole = ({path.name: path.read_bytes() for path in (desk / name).iterdir()} for name in ("parts", "data"))
    assert PARTS and made == whole


def test_files_that_the_readme_names_are_there():
    text = (TOP / "README.md").read_text()
    for name in re.findall(r"\]\((\w+\.\w+)\)", text) + re.findall(r"`(tests/\w+\.py|\w+\.(?:py|sh|yml))`", text):
        assert (TOP / name).exists(), name


def test_every_flag_that_the_readme_names_exists():
    flag = re.compile(r"(?<![\w-])--[a-z]+(?:-[a-z]+)*")
    helps = "".join(
        subprocess.run([sys.executable, TOP / name, "--help"], capture_output=True, text=True).stdout
        for name in ("imagenet_shards.py", "imagenet_train.py")
    )
    helps += "".join(path.read_text() for path in (TOP / "tests" / "benchmarks").glob("*.py"))
    others = "--rm --build-arg --dataset --data-dir "  # docker's, timm's
    others += "--nnodes --nproc-per-node --rdzv-backend --rdzv-endpoint "  # torchrun's
    others += "--nodes --ntasks-per-node --gpus-per-node"  # srun's
    assert set(flag.findall((TOP / "README.md").read_text())) <= set(flag.findall(helps + others))


def test_demo(tmp_path):
    """In a copy of the checkout that has nothing but the virtual environment: the promised accuracy, and the files."""
    names = subprocess.run(["git", "ls-files"], cwd=TOP, capture_output=True, text=True, check=True).stdout.split()
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(TOP / name, tmp_path / name)
    (tmp_path / ".venv").symlink_to(TOP / ".venv")
    if not (TOP / ".venv" / "installed-requirements.txt").exists():
        pytest.fail("./run test makes .venv; run the tests with it")
    run = subprocess.run(["./run", "demo"], cwd=tmp_path, capture_output=True, text=True, timeout=800)
    assert run.returncode == 0, run.stderr[-2000:]
    results = re.findall(r"validated 300/300 images: top-1 ([\d.]+) %", run.stdout)
    assert len(results) == 5 and float(results[-1]) >= 90
    for name in ("preview.png", "data/imagenet-train.json", "output/version_0/last.ckpt", "output/version_0/best.ckpt"):
        assert (tmp_path / "demo" / name).exists()
        assert f"demo/{name.split('/')[0]}" in run.stdout
