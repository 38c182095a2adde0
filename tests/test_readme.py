"""Every command of the README, executed as it stands, or the reason why not."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import faults
import pytest
from PIL import Image
from test_train import SMALL

TOP = Path(__file__).parent.parent
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", (TOP / "README.md").read_text(), re.DOTALL)
    for line in block.splitlines()
]
# Only where ImageNet lies, and which port is free, is put in; and so that it takes seconds, these flags are added.
QUICK = " ".join([*SMALL, "--max-epochs=1", "--workers=1"])
TREE, SERVER = "/data/imagenet", "http://localhost:8080/"
ELSEWHERE = {
    "./run demo": "test_demo below",
    "./run test": "this is it",
    "pip install -r requirements.txt": "./run does it",
    'docker run --rm -p 8080:80 -v "$PWD/data:/usr/share/nginx/html:ro" nginx': "needs a container engine and its registry",
    "python imagenet_train.py --shards='pipe:gsutil cat gs://bucket/%s'": "needs a bucket; %s is tested with other commands",
    "python imagenet_train.py --shards='pipe:aws s3 cp s3://bucket/%s -'": "needs a bucket; %s is tested with other commands",
    "torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=first-host:29500 imagenet_train.py "
    "--shards=./data": "needs two machines; test_train runs torchrun with 2 and 3 ranks",
    "./run build": "needs a container engine; test_files tests the arguments",
    "./run imagenet_shards.py": "needs a container engine; test_files tests the arguments",
    "./run imagenet_train.py": "needs a container engine; test_files tests the arguments",
    "image=registry/imagenet shards='pipe:gsutil cat gs://bucket/%s' envsubst < ./train.yml | kubectl apply -f -":
    "needs a cluster; test_files renders and validates it",
}
HERE = [command for command in COMMANDS if command not in ELSEWHERE]


def test_every_command_is_executed_or_has_a_reason():
    assert set(ELSEWHERE) <= set(COMMANDS)
    assert len(HERE) >= 8 and all(command.startswith("python imagenet_") for command in HERE)


@pytest.fixture(scope="module")
def desk(tree, tmp_path_factory) -> Path:
    """A folder as a user has it: both scripts, and `python` on the PATH; with the shards that the first command makes."""
    folder = tmp_path_factory.mktemp("desk")
    for name in ("imagenet_shards.py", "imagenet_train.py"):
        shutil.copy(TOP / name, folder)
    (folder / "bin").mkdir()
    (folder / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (folder / "bin" / "python").chmod(0o755)
    execute(folder, HERE[0], tree)
    return folder


def execute(folder: Path, command: str, tree: Path, server: str = SERVER) -> str:
    command = command.replace(TREE, str(tree)).replace(SERVER, server)
    command = command.replace("/tmp/imagenet-cache", f"{folder}/cache")
    if "imagenet_train.py" in command:
        command += f" {QUICK}"
    env = os.environ | {"PATH": f"{folder}/bin:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(["bash", "-c", command], cwd=folder, env=env, capture_output=True, text=True, timeout=800)
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


@pytest.mark.parametrize("command", HERE)
def test_a_command_as_it_stands(desk, tree, command):
    shutil.rmtree(desk / "output", ignore_errors=True)
    with faults.fault_server(desk / "data") as server:
        out = execute(desk, command, tree, server.url)
    if "--preview" in command:
        assert Image.open(desk / "preview.png").width > 100
    elif "imagenet_train" in command:
        assert "validated 30/30 images" in out and (desk / "output" / "last.ckpt").exists()
    elif "--verify" in command:
        assert out.count("all as the index says") == 2
    else:
        assert "60 images" in out and (desk / "data" / "imagenet-train.json").exists()


def test_files_that_the_readme_names_are_there():
    text = (TOP / "README.md").read_text()
    for name in re.findall(r"\]\((\w+\.\w+)\)", text) + re.findall(r"`(tests/\w+\.py|\w+\.(?:py|sh|yml))`", text):
        assert (TOP / name).exists(), name


def test_every_flag_that_the_readme_names_exists():
    helps = "".join(
        subprocess.run([sys.executable, TOP / name, "--help"], capture_output=True, text=True).stdout
        for name in ("imagenet_shards.py", "imagenet_train.py")
    )
    others = {"--rm", "--nnodes", "--nproc", "--rdzv", "--build", "--dataset", "--data", "--help"}  # docker's, torchrun's …
    for flag in set(re.findall(r"(?<![\w-])--[a-z]+(?:-[a-z]+)*", (TOP / "README.md").read_text())):
        assert flag in helps or any(flag.startswith(other) for other in others), flag


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
    for name in ("preview.png", "data/imagenet-train.json", "output/last.ckpt", "output/best.ckpt"):
        assert (tmp_path / "demo" / name).exists()
        assert f"demo/{name.split('/')[0]}" in run.stdout
