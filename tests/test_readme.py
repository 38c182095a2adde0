"""Every command, code block and message of the README, executed as it stands, or the reason why not."""

import contextlib
import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType

import kubernetes_validate
import places
import pytest
import torch
import torchvision
import yaml
from conftest import convert
from PIL import Image
from training import BATCH, SMALL
from warm import python

import imagenet_shards
import imagenet_train as script

TOP = Path(__file__).parent.parent
README = (TOP / "README.md").read_text()


def code(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


COMMANDS = [line for block in code("sh") for line in block.splitlines()]
# Flags that make a run take seconds. They come first, so that those of the README count.
QUICK = {
    "imagenet_shards.py": "--maxcount=30 --workers=1",
    "imagenet_train.py": " ".join([*SMALL, "--max-epochs=1", "--workers=1"]),
    "limit.py": " ".join([*SMALL, "--workers=1", "--steps=1"]),
}
MODEL = SMALL[0].removeprefix("--model=")
TREE, SERVER, SERVE = "/data/imagenet", "http://localhost:8080/", "python3 -m http.server 8080 --directory=./data"
ELSEWHERE = {
    "./run demo": "test_demo below",
    "./run test": "this is it",
    'docker run --rm -p 8080:80 -v "$PWD/data:/usr/share/nginx/html:ro" nginx':
    "needs a container engine and its registry; below, an nginx without a container serves the same folder",
    SERVE: "serves the folder for the command with curl below",
    next(command for command in COMMANDS if "pipe:az " in command): "needs an account at Azure",
    next(command for command in COMMANDS if command.startswith("torchrun")):
    "needs two machines; test_run_cluster runs torchrun on two hosts",
    next(command for command in COMMANDS if command.startswith("srun")): "needs Slurm and 16 GPUs",
    "./run build": "test_run_container does it, where a container engine answers",
    "./run imagenet_shards.py": "test_run_container does it, where a container engine answers",
    "./run imagenet_train.py": "test_run_container does it, where a container engine answers",
    './run build --build-arg tools="gsutil awscli"': "test_run_container does it, where a container engine answers",
    next(command for command in COMMANDS if command.startswith("credentials=")):
    "test_run_container does it, where a container engine answers",
    next(command for command in COMMANDS if "kubectl" in command): "needs a cluster; see test_run_cluster",
}  # fmt: skip
FIRST = ["python3 ./imagenet_shards.py --imagenet=/data/imagenet", "python3 ./imagenet_train.py"]  # the desk's
HERE = [command for command in COMMANDS if command not in (*ELSEWHERE, *FIRST)]
for data in ("./timm", "./pets"):  # shards and then training
    together = [command for command in HERE if data in command]
    HERE = [command for command in HERE if command not in together] + [" && ".join(together)]
# What writes into a bucket, and what reads from it.
BACK = {
    "gsutil cp - gs://bucket/%s": "gsutil cat gs://bucket/%s",
    "aws s3 cp - s3://bucket/%s": "aws s3 cp s3://bucket/%s -",
}
# What is not here and takes its arguments as the real one does: an array of jobs, one after another.
SBATCH = """#!/bin/bash
range=${1#--array=}
for n in $(seq "${range%-*}" "${range#*-}"); do SLURM_ARRAY_TASK_ID=$n sh -c "${2#--wrap=}" || exit; done
"""


def make_desk(folder: Path) -> Path:
    """A folder as a user has it: the scripts, and commands on the PATH."""
    (folder / "bin").mkdir(parents=True)
    for name in ("imagenet_shards.py", "imagenet_train.py", "requirements.txt"):
        shutil.copy(TOP / name, folder)
    (folder / "tests").symlink_to(TOP / "tests")
    programs = {name: f'#!/bin/sh\nexec {python()} "$@"\n' for name in ("python", "python3")}
    programs |= {"pip3": f'#!/bin/sh\nPIP_NO_INDEX=1 exec {sys.executable} -m pip "$@"\n', "sbatch": SBATCH}
    for name, text in programs.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    return folder


def execute(folder: Path, command: str, server: str = SERVER, **env: str) -> str:
    """Run a command of the README in a desk; what it printed. `tree` and `pets` lie in the desk."""
    replace = {
        TREE: "tree", "/data/pets": "pet-images", SERVER: server, "/tmp/imagenet-cache": "../cache",
        "{0000..1023}": "{0000..0001}", "{00..63}": "{00..00}",  # as many shards as there are
        "--recipe=16": "--recipe=16 --progressive=32", "--max-epochs=10": "--max-epochs=1",
        "IMAGENET1K_V2": "IMAGENET1K_V1",  # the small model has no others
    } | {name: f"{name} {flags}" for name, flags in QUICK.items()}  # fmt: skip
    for old, new in replace.items():
        command = command.replace(old, new)
    env = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_HOME": f"{folder.parent}/hub"} | env
    env["PATH"] = f"{folder}/bin:{env['PATH']}"
    run = subprocess.run(["bash", "-c", command], cwd=folder, env=env, capture_output=True, text=True, timeout=800)
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


def make_pets(tree: Path, folder: Path) -> None:
    """A tree of 20 classes: each of the ten under two names."""
    for split in ("train", "val"):
        for path in (tree / split).iterdir():
            for name in (f"cat-{path.name}", f"dog-{path.name}"):
                shutil.copytree(path, folder / split / name)


@pytest.fixture(scope="module")
def desk(tree, tmp_path_factory) -> Path:
    """With the results of the first two commands, other data, and published weights where PyTorch keeps downloads."""
    folder = make_desk(tmp_path_factory.mktemp("readme") / "desk")
    (folder / "tree").symlink_to(tree)
    make_pets(tree, folder / "pet-images")
    url = torchvision.models.get_model_weights(MODEL).DEFAULT.url
    (folder.parent / "hub" / "hub" / "checkpoints").mkdir(parents=True)
    model = torchvision.models.get_model(MODEL, num_classes=10)
    torch.save(model.state_dict(), folder.parent / "hub" / "hub" / "checkpoints" / url.rpartition("/")[2])
    shutil.copy(TOP / ".gitignore", folder)
    for arguments in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", *arguments], cwd=folder, check=True)
    for command in FIRST:
        out = execute(folder, command)
    assert "validated 30/30 images" in out
    (folder / "timm").mkdir()
    for split, name in (("train", "imagenet1k-train-{:04d}.tar"), ("val", "imagenet1k-validation-{:02d}.tar")):
        for number, path in enumerate(sorted(folder.glob(f"data/imagenet-{split}-*.tar"))):
            (folder / "timm" / name.format(number)).symlink_to(path)
    return folder


def same_shards(one: Path, other: Path) -> bool:
    one, other = ({path.name: path.read_bytes() for path in p.iterdir() if path.is_file()} for p in (one, other))
    return one == other and bool(one)


# ---------------------------------------------------------------- commands


def test_every_command_is_executed_or_has_a_reason():
    assert {*ELSEWHERE, *FIRST} <= {*COMMANDS}
    assert len(HERE) >= 18 and all(re.match(r"(python3|pip3|sbatch) ", command) for command in HERE)


@pytest.mark.parametrize("command", HERE)
def test_a_command_as_it_stands(desk, tmp_path, command):
    write = next((words for words in BACK if words in command), None)
    server, env = SERVER, {}
    versions = len(list(desk.glob("output/version_*")))
    with ExitStack() as stack:
        if "curl" in command:  # served by the README's other server
            port = places.free_port()
            serve = SERVE.replace("8080", str(port)).replace("./data", f"{desk}/data").split()
            stack.enter_context(places.serving(serve, lambda: places.listening(port), tmp_path))
            server = f"http://localhost:{port}/"
        elif SERVER in command:
            server = stack.enter_context(places.nginx(desk / "data"))
        elif "//bucket/" in command:
            (tmp_path / "bucket").mkdir()
            if not write:
                shutil.copytree(desk / "data", tmp_path / "bucket", dirs_exist_ok=True)
            serve = places.gcs(tmp_path) if "gs://" in command else places.s3("bucket", tmp_path / "bucket")
            env = stack.enter_context(serve)
        folder = desk
        if "sbatch" in command or "--resume" in command:
            folder = make_desk(tmp_path / "desk")
            (folder / "tree").symlink_to(desk / "tree")
        if "--resume" in command:
            (folder / "data").symlink_to(desk / "data")
            shutil.copytree(desk / "output" / "version_0", folder / "output" / "version_0")
            command += " --max-epochs=2"
        out = execute(folder, command, server, **env)
        if write:
            back = execute(desk, f"python3 ./imagenet_shards.py --verify --shards='pipe:{BACK[write]}'", **env)
            assert back.count("all as the index says") == 2
    if "venv" in command:
        assert (desk / ".venv" / "bin" / "python3").exists()
    elif "pip3" in command:
        assert "Requirement already satisfied: webdataset" in out
    elif "--preview" in command:
        assert Image.open(desk / "preview.png").width > 100
    elif "limit.py" in command:
        results = re.findall("^(loader alone|step alone|both together) +[0-9,.]+ images/s", out, re.MULTILINE)
        assert len(results) == 3 and re.search("^(step|input)-bound: ", out, re.MULTILINE)
    elif "--verify" in command:
        assert out.count("all as the index says") == 2
    elif "timm" in command:
        assert out.count("2 shards, 60 images") == out.count("1 shard, 30 images") == 1
        assert "60 train images in 2 shards" in out and "validated 30/30 images" in out
    elif "pets" in command:
        assert "20 classes" in out and "the last layer" in out and "validated 60/60 images" in out
    elif "sbatch" in command:
        assert out.count("waiting for") == 1 and same_shards(folder / "data", desk / "data")
    elif "imagenet_shards" in command:
        assert "2 shards, 60 images" in out and "1 shard, 30 images" in out
    elif "--resume" in command:
        assert "validated 30/30 images" in out and [path.name for path in folder.glob("output/*")] == ["version_0"]
    elif "--evaluate" in command:
        assert "validated 30/30 images" in out and "metrics.json" in out
    else:
        assert "validated 30/30 images" in out
        assert len(list(desk.glob("output/version_*"))) == versions + 1
    if "--cache" in command:
        assert len(list((desk.parent / "cache").iterdir())) >= 3
    status = subprocess.run(["git", "status", "--porcelain"], cwd=desk, capture_output=True, text=True, check=True)
    assert "?? " not in status.stdout, "add it to .gitignore"


def test_the_kubernetes_job_makes_the_same_shards(desk, tmp_path):
    [job] = [yaml.safe_load(block) for block in code("yaml")]
    kubernetes_validate.validate(job, "1.31", strict=True)
    [container] = job["spec"]["template"]["spec"]["containers"]
    folder = make_desk(tmp_path / "desk")
    shell, option, command = container["command"]
    command = command.replace("/data/shards", f"{tmp_path}/shards").replace("/data/imagenet", f"{desk}/tree")
    for index in range(job["spec"]["completions"]):
        execute(folder, f"{shell} {option} '{command}'", JOB_COMPLETION_INDEX=str(index))
    assert same_shards(tmp_path / "shards", desk / "data")


# ---------------------------------------------------------------- Python


def test_prediction_of_one_image(desk, tree, tmp_path):
    """The snippet prints the five most likely classes with what the trained model gives for the script's own crop."""
    [snippet] = [block for block in code("python") if "image.jpg" in block]
    image = next((tree / "val").rglob("*_00000020.JPEG"))
    for name in ("data", "output"):
        (tmp_path / name).symlink_to(desk / name)
    shutil.copy(image, tmp_path / "image.jpg")
    (tmp_path / "predict.py").write_text(snippet.replace("resnet50", MODEL))
    run = subprocess.run([python(), "predict.py"], cwd=tmp_path, capture_output=True, text=True, check=True)
    lines = run.stdout.splitlines()
    index = script.read_index(str(desk / "data"), "val")
    config = script.LoaderConfig(index, False, 1, size=224, resize=256)
    pixels, _ = script.decode({"__key__": "x", "__url__": "x", "cls": b"0", "jpg": image.read_bytes()}, config, 0)
    best = desk / "output" / "version_0" / "best.ckpt"
    module = script.Classifier.load_from_checkpoint(best, weights_only=True, map_location="cpu").eval()
    with torch.inference_mode():
        scores = dict(zip(index.class_names or index.classes, module(pixels[None])[0].softmax(0).tolist()))
    assert len(lines) == 5
    for line in lines:
        score, name = line.split("%  ")
        assert float(score) == pytest.approx(100 * scores[name], abs=0.5)


# ---------------------------------------------------------------- changes to the script

Hunk = list[str]  # lines of a diff


def read_changes() -> dict[str, list[Hunk]]:
    """The README's diff, by the first word of the line that describes a change."""
    changes: dict[str, list[Hunk]] = {}
    for line in code("diff")[0].splitlines():
        if name := re.match(r"@@ (\w+)", line):
            changes[name[1]] = []
        if line.startswith("@@"):
            hunks = next(reversed(changes.values()))
            hunks.append([])
        else:
            hunks[-1].append(line)
    return changes


def changed_script(name: str, folder: Path) -> Path:
    """A copy of imagenet_train.py with a change of the README."""
    text = (TOP / "imagenet_train.py").read_text()
    for hunk in read_changes()[name]:
        old, new = ("".join(f"{line[1:]}\n" for line in hunk if line[0] in kinds) for kinds in (" -", " +"))
        assert text.count(old) == 1, f"the README's change is not for this version: {old}"
        text = text.replace(old, new)
    path = folder / "imagenet_train.py"
    path.write_text(text)
    return path


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("changed_imagenet_train", path)
    module = sys.modules["changed_imagenet_train"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_changed(path: Path, shards: Path, model: str = SMALL[0], **env: str) -> Path:
    """Train with a changed script; the run's folder."""
    output = path.parent / "output"
    command = [python(), path, model, *SMALL[1:], "--max-epochs=1", "--workers=1"]
    command += [f"--shards={shards}", f"--output={output}"]
    run = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "validated 30/30 images" in run.stdout
    return output / "version_0"


def test_an_augmentation_does_not_depend_on_the_workers(shards, tmp_path):
    changed = load(changed_script("RandAugment", tmp_path))
    images = {}
    for name, module, workers in (("original", script, 0), ("changed", changed, 0), ("in a process", changed, 1)):
        config = module.LoaderConfig(module.read_index(str(shards), "train"), True, BATCH, 32, workers=workers)
        torch.manual_seed(len(name))
        images[name] = torch.stack([images.clone() for images, _ in module.Loader(config)])
    assert torch.equal(images["changed"], images["in a process"])
    differ = (images["original"] != images["changed"]).flatten(2).any(2)
    assert differ.float().mean() > 0.5 and images["changed"].shape == images["original"].shape


def test_a_timm_model_trains(shards, tmp_path):
    timm = pytest.importorskip("timm")
    path = changed_script("timm", tmp_path)
    folder = run_changed(path, shards, re.search("--model=resnet18d", README)[0])
    timm.create_model("resnet18d", num_classes=10).load_state_dict(torch.load(folder / "model.pt", weights_only=True))


def test_another_logger_logs(shards, tmp_path):
    pytest.importorskip("wandb")
    folder = run_changed(changed_script("Weights", tmp_path), shards, WANDB_MODE="offline")
    [log] = folder.glob("wandb/offline-run-*/*.wandb")
    assert b"val_top1" in log.read_bytes() and (folder / "metrics.csv").exists()


# ---------------------------------------------------------------- messages


def train(shards: Path | str, output: Path, *flags: str) -> None:
    script.main([*QUICK["imagenet_train.py"].split(), f"--shards={shards}", f"--output={output}/out", *flags])


def message_of_a_wrong_folder(shards: Path, tree: Path, folder: Path) -> None:
    imagenet_shards.main([f"--imagenet={tree}/train", f"--shards={folder}/new"])


def message_of_an_invalid_image(shards: Path, tree: Path, folder: Path) -> None:
    shutil.copytree(tree, folder / "tree")
    next((folder / "tree" / "train").rglob("*.JPEG")).write_bytes(b"")
    with contextlib.suppress(SystemExit):
        convert(folder / "tree", folder / "new")


def message_of_another_recipe(shards: Path, tree: Path, folder: Path) -> None:
    convert(tree, shards, "--maxcount=8")


def message_of_an_unfinished_conversion(shards: Path, tree: Path, folder: Path) -> None:
    convert(tree, folder / "new", "--part=1/2", "--maxcount=7")
    train(folder / "new", folder)


def message_of_an_index_without_blocks(shards: Path, tree: Path, folder: Path) -> None:
    path = shards / "imagenet-train.json"
    index = json.loads(path.read_text())
    for entry in index["shardlist"]:
        del entry["blocks"]
    path.write_text(json.dumps(index))
    train(shards, folder)


def message_of_a_wrong_url(shards: Path, tree: Path, folder: Path) -> None:
    with places.nginx(shards) as url:
        train(f"{url}nowhere/", folder)


def message_of_a_stall(shards: Path, tree: Path, folder: Path) -> None:
    train(f"pipe:sleep 9; cat {shards}/%s", folder, "--timeout=0.1", "--retries=1")


def message_of_other_bytes(shards: Path, tree: Path, folder: Path) -> None:
    for path in shards.glob("imagenet-train-*.tar"):
        data = bytearray(path.read_bytes())
        data[5000] ^= 1
        path.write_bytes(data)
    train(shards, folder)


def message_of_a_killed_process(shards: Path, tree: Path, folder: Path) -> None:
    train(f"pipe:case %s in *.tar) kill -9 $PPID; esac; cat {shards}/%s", folder)


def message_of_other_shards(shards: Path, tree: Path, folder: Path) -> None:
    train(shards, folder, "--max-steps=3")
    convert(tree, shards, "--maxcount=7", "--seed=1", "--overwrite")
    train(shards, folder, "--resume")


MESSAGES: list[Callable[[Path, Path, Path], None]] = [
    message_of_a_wrong_folder, message_of_an_invalid_image, message_of_another_recipe,
    message_of_an_unfinished_conversion, message_of_an_index_without_blocks, message_of_a_wrong_url,
    message_of_a_stall, message_of_other_bytes, message_of_a_killed_process, message_of_other_shards,
]  # fmt: skip
ROWS = re.findall(r"^\| `(.*?)` \| .* \|$", README.partition("## Troubleshooting")[2], re.MULTILINE)


@pytest.mark.parametrize("number", range(len(MESSAGES)), ids=[f.__name__ for f in MESSAGES])
def test_a_message_is_printed(shards, tree, tmp_path, capfd, number):
    assert len(ROWS) == len(MESSAGES)
    shutil.copytree(shards, tmp_path / "data")
    MESSAGES[number](tmp_path / "data", tree, tmp_path)
    expected = ".*".join(map(re.escape, ROWS[number].split("…")))
    assert re.search(expected, capfd.readouterr().err), ROWS[number]


# ---------------------------------------------------------------- names


def test_files_that_the_readme_names_are_there():
    names = re.findall(r"\]\((\.?[\w/]+\.\w+)\)", README) + re.findall(r"`(\w+\.(?:py|sh|yml))`", README)
    names += re.findall(r"\btests/[\w/]+\.\w+", README)
    assert len(names) >= 20
    for name in names:
        assert (TOP / name).exists(), name


@functools.cache
def flags_in(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"(?<![\w-])--[a-z]+(?:-[a-z]+)*", text))


def test_every_flag_that_the_readme_names_exists():
    helps = "".join(
        subprocess.run([python(), TOP / name, "--help"], capture_output=True, text=True).stdout
        for name in ("imagenet_shards.py", "imagenet_train.py")
    )
    helps += "".join(path.read_text() for path in (TOP / "tests" / "benchmarks").glob("*.py"))
    others = "--rm --build-arg --directory --dataset --data-dir "  # docker's, http.server's, timm's
    others += "--nnodes --nproc-per-node --rdzv-backend --rdzv-endpoint --array --wrap "  # torchrun's, sbatch's
    others += "--nodes --ntasks-per-node --gpus-per-node "  # srun's
    others += "--account-name --container-name --name --no-progress"  # az's
    assert flags_in(README) <= flags_in(helps + others)


@pytest.mark.long
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
    assert len(results) == 4 and float(results[-1]) >= 90
    *_, result, files = run.stdout.splitlines()
    assert float(result.removeprefix("# top-1 accuracy: ")) == pytest.approx(max(map(float, results)) / 100, abs=1e-3)
    names = re.findall(r"demo/[\w/]+\.\w+", files)
    assert {Path(name).name for name in names} == {"preview.png", "metrics.csv", "last.ckpt", "best.ckpt"}
    for name in names:
        assert (tmp_path / name).exists()
