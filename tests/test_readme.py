"""Every command and code block of README.md, executed as it stands or listed with the reason why not; its claims."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
from contextlib import ExitStack
from pathlib import Path

import places
import pytest
import torch
import torchvision
import webdataset as wds
from faults import cut, fault_server
from runs import BATCH, SMALL

import imagenet_train as script
from imagenet_shards import UserError

TOP = Path(__file__).parent.parent
README, SCRIPT = ((TOP / name).read_text() for name in ("README.md", "imagenet_train.py"))


def code(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_it_has_at_most_1500_words():
    assert len(README.split()) <= 1500  # as `wc -w` counts


def test_code_fits_into_the_width_of_a_page_on_github():
    """916 of its 1,012 px, at up to 8.2 px a character. Lines of the script in a diff may be longer."""
    lines = [line for block in code(r"\w*") for line in block.splitlines()]
    assert len(lines) > 60 and [line for line in lines if len(line) > 111 and f"{line[1:]}\n" not in SCRIPT] == []


def test_links_and_files_exist():
    paths = re.findall(r"\]\((?!https?://)([^)#]+)\)", README) + re.findall(r"`(\w+\.(?:py|sh|yml))`", README)
    paths += [f"tests/benchmarks/{name}" for name in re.findall(r"`(\w+\.py) --tree", README)]
    assert len(paths) >= 10 and [path for path in paths if not (TOP / path).exists()] == []
    assert "](#" not in README  # anchors would need a test


def test_the_readme_of_the_tests_names_each_file_and_section():
    text = (TOP / "tests" / "README.md").read_text()
    names = re.findall(r"^# -{9,} (.*)", SCRIPT + (TOP / "imagenet_shards.py").read_text(), re.MULTILINE)
    names += [f"`{path.name}`" for path in TOP.glob("tests/test_*.py")]
    assert len(names) > 30 and [name for name in names if name not in text] == []


def test_every_flag_exists():
    """Flags outside of commands, which are executed, and those of the benchmarks."""
    known = "".join(path.read_text() for path in [*TOP.glob("*.py"), *TOP.glob("tests/benchmarks/*.py")])
    text = re.sub(r"^```.*?^```", "", README, flags=re.DOTALL | re.MULTILINE)
    flags = {*re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)}
    assert len(flags) >= 8 and [flag for flag in flags if f'"{flag}"' not in known] == []


# ---------------------------------------------------------------- commands

COMMANDS = [line for block in code("sh") for line in block.splitlines()]
TREE, SERVER, CACHE = "/data/imagenet", "http://localhost:8080/", "/tmp/imagenet-cache"
FIRST = ["python3 imagenet_shards.py --imagenet=/data/imagenet", "python3 imagenet_train.py"]  # the desk's
# Words of commands that are executed one after another, and what the last one prints.
TRAINED = "60 train images in .*validated 30/30 images"
CASES = {
    ("-m venv", "pip3"): "Requirement already satisfied: webdataset",
    ("--verify",): "imagenet-train.*all as the index says.*imagenet-val.*all as the index says",
    ("--splits=train", "--splits=val"): "1 shard, 30 images",
    ("--preview",): "preview.png: 4 images of the first training batch",
    ("--resume",): r"resuming at the start of epoch 2.*validated 30/30 images.*\(epoch 2, step 30\)",
    ("--evaluate --weights=output",): "validated 30/30 images.*metrics.json",
    (SERVER + " ",): TRAINED,
    ("pipe:curl",): TRAINED,
    ("gsutil -m rsync", "python3 imagenet_train.py --shards='pipe:gsutil"): TRAINED,
    ("aws s3 sync", "python3 imagenet_train.py --shards='pipe:aws"): TRAINED,
    ("--imagenet=/data/pets", "--shards=pets --weights"): "120 train.* 20 classes.*last layer, fc.*validated 60/60",
}  # fmt: skip
ELSEWHERE = {
    "./run demo": "test_demo below",
    "./run test": "this is it",
    "IMAGENET1K_V2": "downloads them, for 1,000 classes; test_train_model.py evaluates such weights",
    "pipe:az": "needs an account at Azure",
    "torchrun": "needs two machines; test_run_cluster.py runs torchrun on two hosts",
    "srun": "needs Slurm and 16 GPUs",
    "./run build": "test_run_container.py does it, where a container engine answers",
    "./run imagenet_": "test_run_container.py does it, where a container engine answers",
    "envsubst": "needs a cluster; test_run_cluster.py checks what it applies",
}


def commands_with(words: str) -> list[str]:
    return [command for command in COMMANDS if words in f"{command} " and command not in FIRST]


def test_every_command_is_executed_or_has_a_reason():
    executed = [words for case in CASES for words in case]
    assert all(len(commands_with(words)) == 1 for words in executed) and all(map(commands_with, ELSEWHERE))
    named = [*FIRST, *(command for words in (*executed, *ELSEWHERE) for command in commands_with(words))]
    assert {*named} == {*COMMANDS}


def make_desk(folder: Path) -> Path:
    """A folder as a user has it: the scripts, and python3 and pip3 on the PATH."""
    (folder / "bin").mkdir(parents=True)
    for name in ("imagenet_shards.py", "imagenet_train.py", "requirements.txt", ".gitignore"):
        shutil.copy(TOP / name, folder)
    for name, module in (("python3", ""), ("pip3", "-m pip")):
        (folder / "bin" / name).write_text(f'#!/bin/sh\nPIP_NO_INDEX=1 exec {sys.executable} {module} "$@"\n')
        (folder / "bin" / name).chmod(0o755)
    return folder


def execute(desk: Path, command: str, server: str = SERVER, epochs: int = 1, **env: str) -> str:
    """Run a command of the README; what it printed. tree and pet-images in the desk stand for those in /data."""
    replace = {
        TREE: "tree", "/data/pets": "pet-images", SERVER: server, CACHE: "../cache", " --max-epochs=10": "",
        "{0000..1023}": "{0000..0001}", "{00..63}": "{00..00}",  # as many shards as there are
        "imagenet_train.py": " ".join(["imagenet_train.py", *SMALL, "--workers=1", f"--max-epochs={epochs}"]),
        "shards.py --imagenet": "shards.py --maxcount=30 --imagenet",
    }  # fmt: skip
    for old, new in replace.items():
        command = command.replace(old, new)
    env = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_HOME": f"{desk.parent}/hub"} | env
    env |= {"PATH": f"{desk}/bin:{env['PATH']}"}
    run = subprocess.run(["bash", "-c", command], cwd=desk, env=env, capture_output=True, text=True, timeout=800)
    assert run.returncode == 0 and "Warning" not in run.stderr, run.stderr[-2000:]
    return run.stdout


@pytest.fixture(scope="module")
def desk(tree, tmp_path_factory) -> Path:
    """With the results of the first commands, other data, and published weights where PyTorch keeps downloads."""
    folder = make_desk(tmp_path_factory.mktemp("readme") / "desk")
    (folder / "tree").symlink_to(tree)
    for path in (path for split in ("train", "val") for path in (tree / split).iterdir()):
        for kind in ("cat", "dog"):  # the ten classes under two names each
            shutil.copytree(path, folder / "pet-images" / path.parent.name / f"{kind}-{path.name}")
    model, downloads = SMALL[0].removeprefix("--model="), folder.parent / "hub" / "hub" / "checkpoints"
    downloads.mkdir(parents=True)
    url = torchvision.models.get_model_weights(model).DEFAULT.url
    torch.save(torchvision.models.get_model(model).state_dict(), downloads / url.rpartition("/")[2])
    for command in ("git init -q && git add -A", *FIRST):
        out = execute(folder, command)
    assert re.search(TRAINED, out, re.DOTALL)
    (folder / "hf").mkdir()
    for split, name in (("train", "imagenet1k-train-{:04d}.tar"), ("val", "imagenet1k-validation-{:02d}.tar")):
        for number, path in enumerate(sorted(folder.glob(f"data/imagenet-{split}-*.tar"))):
            (folder / "hf" / name.format(number)).symlink_to(path)
    return folder


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_commands_as_they_stand(desk, tmp_path, case):
    server, env, folder, epochs = SERVER, {}, desk, 1
    with ExitStack() as stack:
        if SERVER in commands_with(case[0])[0]:
            server = stack.enter_context(places.nginx(desk / "data"))
        elif "gsutil" in case[0]:
            (tmp_path / "bucket").mkdir()
            env = stack.enter_context(places.gcs(tmp_path))
        elif "aws" in case[0]:
            env = stack.enter_context(places.s3("bucket"))
        elif case == ("--resume",):  # it would change the results of the first commands
            folder, epochs = make_desk(tmp_path / "desk"), 2
            (folder / "data").symlink_to(desk / "data")
            shutil.copytree(desk / "output" / "version_0", folder / "output" / "version_0")
        for words in case:
            out = execute(folder, commands_with(words)[0], server, epochs, **env)
    assert re.search(CASES[case], out, re.DOTALL), out
    assert SERVER + " " not in case or any((desk.parent / "cache").iterdir())
    assert "?? " not in execute(desk, "git status --porcelain"), "add it to .gitignore"


@pytest.mark.long
def test_demo(tmp_path):
    """In a checkout that has nothing but the virtual environment: the promised accuracy, then the Python blocks."""
    (tmp_path / "tests").mkdir()
    for name in ("run", "config.sh", "requirements.txt", "imagenet_shards.py", "imagenet_train.py", "tests/standin.py"):
        shutil.copy(TOP / name, tmp_path / name)
    (tmp_path / ".venv").symlink_to(TOP / ".venv")
    assert (TOP / ".venv" / "installed-requirements.txt").exists(), "./run test makes it; run the tests with it"
    run = subprocess.run(["./run", "demo"], cwd=tmp_path, capture_output=True, text=True, timeout=800)
    assert run.returncode == 0 and "Warning" not in run.stderr, run.stderr[-2000:]
    results = re.findall(r"validated 300/300 images: top-1 ([\d.]+) %", run.stdout)
    assert len(results) == 4 and float(results[-1]) > 90
    kept = [tmp_path / name for name in re.findall(r"demo/[\w/]+\.\w+", run.stdout.splitlines()[-1])]
    assert {path.name for path in kept if path.exists()} == {"preview.png", "metrics.csv", "last.ckpt", "best.ckpt"}
    webdataset, loader = code("python")
    for block, images, shape in ((webdataset, 1000, "3, 224, 224"), (loader, 2 * 960, "224, 224, 3")):
        run = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0 and "Warning" not in run.stderr, run.stderr[-2000:]
        assert sum(map(int, re.findall(rf"torch.Size\(\[(\d+), {shape}\]\)", run.stdout))) == images


# ---------------------------------------------------------------- what WebDataset does


def read_with_webdataset(url: str) -> list[str]:
    """The keys of the samples, as WebDataset reads a shard."""
    return [sample["__key__"] for sample in wds.WebDataset([url], shardshuffle=False, empty_check=False)]


@pytest.fixture(scope="module")
def boundary(shards) -> tuple[Path, int]:
    """A shard of 7 samples, and where its fifth begins."""
    path = shards / "imagenet-train-000001.tar"
    with tarfile.open(path) as tar:
        return path, tar.getmembers()[2 * 4].offset


def test_webdataset_raises_for_six_ordinary_failures(boundary, tmp_path):
    path, at = boundary
    shutil.copy(path, tmp_path / "cut.tar")
    os.truncate(tmp_path / "cut.tar", at + 600)  # within a member
    with fault_server(path.parent) as server:
        server.faults[path.name] = [cut(lambda data: at + 600)]
        failures = {
            "404": f"{server.url}none.tar",
            "404 without -f": f"pipe:curl -s {server.url}none.tar",
            "refused": f"http://127.0.0.1:{places.free_port()}/",
            "a command that dies midway": f"pipe:head -c {at + 600} {path}; kill -9 $$",
            "a cut download": server.url + path.name,
            "a cut file": str(tmp_path / "cut.tar"),
        }
        for url in failures.values():
            with pytest.raises((OSError, tarfile.ReadError)):
                read_with_webdataset(url)
        assert read_with_webdataset(server.url + path.name) == read_with_webdataset(str(path))  # without a fault


def test_webdataset_loses_samples_in_silence_if_a_stream_ends_between_members(shards, boundary, tmp_path):
    """A truncated file; a command that ends its output before its exit status comes. Here, both are an error."""
    path, at = boundary
    shutil.copytree(shards, tmp_path / "data")
    copy = tmp_path / "data" / path.name
    os.truncate(copy, at)
    command = f"head -c {at} {path}; exec >&-; sleep 0.5; exit 18"
    keys = read_with_webdataset(str(path))
    assert read_with_webdataset(str(copy)) == read_with_webdataset(f"pipe:{command}") == keys[:4] != keys
    commands = f"pipe:case %s in {path.name}) {command};; *) cat {shards}/%s;; esac"
    for prefix, message in ((str(tmp_path / "data"), "found"), (commands, "exit status 18")):
        index = script.read_index(prefix, "train")
        with pytest.raises(UserError, match=f"{path.name}.*{message}"):
            list(script.Loader(script.LoaderConfig(index, True, BATCH, 32, retry_for=0)))


def test_ranks_get_unequal_numbers_of_batches_from_webdataset(shards, monkeypatch):
    urls = list(map(str, shards.glob("imagenet-train-*.tar")))
    monkeypatch.setenv("WORLD_SIZE", "2")
    theirs, ours = [], []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        theirs += [len(list(wds.WebDataset(urls, shardshuffle=9, nodesplitter=wds.split_by_node).batched(BATCH)))]
        config = script.LoaderConfig(script.read_index(str(shards), "train"), True, BATCH, 32, rank=rank, world=2)
        ours += [len(list(script.Loader(config)))]
    assert theirs[0] != theirs[1] and ours[0] == ours[1]


def test_webdataset_runs_code_in_a_pickle(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with wds.TarWriter("a.tar") as writer:
        writer.write({"__key__": "a", "pyd": b"cos\nmkdir\n(S'unpickled'\ntR."})  # os.mkdir("unpickled")
    assert list(wds.WebDataset("a.tar", shardshuffle=False).decode("pil")) and Path("unpickled").is_dir()


# ---------------------------------------------------------------- changes to the script


def changed_script(folder: Path, *numbers: int) -> Path:
    """A copy of imagenet_train.py with changes of the README, applied as it says."""
    for name in ("imagenet_shards.py", "imagenet_train.py"):
        shutil.copy(TOP / name, folder)
    for number in numbers:
        subprocess.run(["git", "apply"], cwd=folder, input=code("diff")[number], text=True, check=True)
    return folder / "imagenet_train.py"


def run_changed(path: Path, shards: Path, model: str = SMALL[0], **env: str) -> Path:
    """Train with a changed script; the run's folder."""
    command = [sys.executable, path, model, *SMALL[1:], "--max-epochs=1", "--workers=1", f"--shards={shards}"]
    run = subprocess.run(command, cwd=path.parent, env=os.environ | env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0 and "validated 30/30 images" in run.stdout, run.stderr[-2000:]
    return path.parent / "output" / "version_0"


def test_all_changes_apply_together(tmp_path):
    assert changed_script(tmp_path, *range(len(code("diff")))).read_text() != SCRIPT


def test_an_augmentation_does_not_depend_on_the_workers(shards, tmp_path, monkeypatch):
    changed_script(tmp_path, 0).rename(tmp_path / "changed_train.py")
    monkeypatch.syspath_prepend(tmp_path)
    changed = importlib.import_module("changed_train")
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
    folder = run_changed(changed_script(tmp_path, 1), shards, "--model=resnet18d")
    timm.create_model("resnet18d", num_classes=10).load_state_dict(torch.load(folder / "model.pt", weights_only=True))


def test_another_logger_logs(shards, tmp_path):
    pytest.importorskip("wandb")
    folder = run_changed(changed_script(tmp_path, 2), shards, WANDB_MODE="offline")
    [log] = folder.glob("wandb/offline-run-*/*.wandb")
    assert b"val_top1" in log.read_bytes() and (folder / "metrics.csv").exists()
