"""Every command and code block of README.md, executed as it stands or listed with the reason why not; its claims."""

import importlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import tarfile
from contextlib import nullcontext
from pathlib import Path

import places
import pytest
import torch
import torchvision
import webdataset as wds
from faults import fault_server
from runs import BATCH, SMALL

import imagenet_train as script
from imagenet_shards import UserError

TOP = Path(__file__).parent.parent
README, SHARDS, SCRIPT = ((TOP / name).read_text() for name in ("README.md", "imagenet_shards.py", "imagenet_train.py"))
TEXT = re.sub(r"^```.*?^```", "", README, flags=re.DOTALL | re.MULTILINE)  # without code blocks


def code(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


# ---------------------------------------------------------------- names


def test_names_exist():
    """Links and files; headings in the table of contents; flags outside of commands, which are executed; functions."""
    paths = re.findall(r"\]\((?!https?://)([^)#]+)\)", TEXT) + re.findall(r"`(\w+\.(?:py|sh|yml))`", TEXT)
    paths += re.findall(r'src="([^"]+)"', TEXT)
    assert len(paths) >= 10 and [path for path in paths if not (TOP / path).exists()] == []
    headings = [re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in re.findall("^## (.*)", TEXT, re.M)]
    assert re.findall(r"\]\(#([^)]+)\)", TEXT) == headings != []
    flags = re.findall(r"(?<![\w-])--[a-z][a-z-]*", TEXT)
    assert len(flags) >= 8 and [flag for flag in flags if f'"{flag}"' not in SHARDS + SCRIPT] == []
    functions = re.findall(r"`(\w+)\(\)`", TEXT) + re.findall(r"\| `(\w+)` \| [A-Z][a-z]", TEXT) + ["Files", "Command"]
    known = re.findall(r"^ *(?:class|def) (\w+)", SHARDS + SCRIPT, re.MULTILINE)
    assert len(functions) >= 12 and [name for name in functions if name not in known] == []


def test_the_readme_of_the_tests_names_each_file_and_section():
    text, names = (TOP / "tests/README.md").read_text(), [f"`{path.name}`" for path in TOP.glob("tests/test_*.py")]
    names += re.findall(r"^# -{9,} (.*)", SCRIPT + SHARDS, re.MULTILINE)
    assert len(names) > 30 and [name for name in names if name not in text] == []


# ---------------------------------------------------------------- commands

LINES = [line for block in code("sh") for line in block.replace("\\\n", "").splitlines()]
COMMANDS = [line for line in LINES if not line.startswith("#")]
COMMANDS += [f"python3 imagenet_train.py {words}" for words in re.findall(r"\| `(--shards=.*?)` \|", TEXT)]
SERVER = "http://localhost:8080/"
PACK, TRAIN = "python3 imagenet_shards.py --imagenet=/data/imagenet", "python3 imagenet_train.py"
# Words of commands that are executed one after another, and what they print. A \n ends a command.
TRAINED = "60 train images in .*?validated 30/30 images.*?"
CASES = {
    ("-m venv", "pip3"): "Requirement already satisfied: webdataset",
    ("--verify",): "train: .*all as the index says.*val: .*all as the index says",
    ("--preview",): "preview.png: 4 images",
    ("--evaluate --weights=output",): "validated 30/30 images.*metrics.json",
    ("--shards=./data\n", f"--shards={SERVER}\n", "--cache", "pipe:curl"): 4 * TRAINED,
    ("aws s3 sync", f"{TRAIN} --shards=s3:", "pipe:aws"): 2 * TRAINED,
    ("gsutil -m rsync", f"{TRAIN} --shards=gs:", "pipe:gsutil"): 2 * TRAINED,
    ("--splits=train", "--splits=val", "--index=hub\n"): TRAINED,
    ("--imagenet=/data/pets", "--shards=pets --weights"): "120 train.* 20 classes.*last layer, fc.*validated 60/60",
}  # fmt: skip
ELSEWHERE = {
    PACK: "the desk's", f"{TRAIN}\n": "the desk's", "--resume": "the desk's",
    "IMAGENET1K_V2": "downloads them, for 1,000 classes; test_train_model.py evaluates such weights",
    "torchrun": "needs two machines; test_run_cluster.py runs torchrun on two hosts",
    "srun": "needs Slurm and 16 GPUs",
    "./run ": "test_demo below; test_run_container.py does the others, where a container engine answers",
    "envsubst": "needs a cluster; test_run_cluster.py checks what it applies",
}  # fmt: skip


def commands_with(words: str) -> list[str]:
    return [command for command in COMMANDS if words in f"{command}\n"]


def test_every_command_is_executed_or_has_a_reason():
    executed = [words for case in CASES for words in case]
    assert all(len(commands_with(words)) == 1 for words in executed) and all(map(commands_with, ELSEWHERE))
    assert {command for words in (*executed, *ELSEWHERE) for command in commands_with(words)} == {*COMMANDS}


def execute(desk: Path, command: str, server: str = SERVER, epochs: int = 1, **env: str) -> str:
    """Run a command of the README; what it printed. tree and pet-images in the desk stand for those in /data."""
    replace = {
        "/data/imagenet": "tree", "/data/pets": "pet-images", SERVER: server, "/tmp/imagenet-cache": "../cache",
        "timm/imagenet-1k-wds": "me/data", "{0000..1023}": "{0..1}", "{00..63}": "{0..0}", " --max-epochs=10": "",
        "imagenet_train.py": " ".join(["imagenet_train.py", *SMALL, "--workers=1", f"--max-epochs={epochs}"]),
        "shards.py --imagenet": "shards.py --maxcount=30 --imagenet",
    }  # fmt: skip
    for old, new in replace.items():
        command = command.replace(old, new)
    env = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_HOME": f"{desk.parent}/hub"} | env
    env |= {"PATH": f"{desk}/bin:{env['PATH']}"}
    env["PYTHONWARNINGS"] = "ignore:You are using a non-supported Python"  # Google's packages, on Python 3.10
    run = subprocess.run(["bash", "-c", command], cwd=desk, env=env, capture_output=True, text=True, timeout=800)
    assert run.returncode == 0 and "Warning" not in run.stderr, run.stderr[-2000:]
    return run.stdout


@pytest.fixture(scope="module")
def desk(tree, tmp_path_factory) -> Path:
    """A folder as a user has it, with the results of the first commands. Beside it shards of others, and downloads."""
    folder = tmp_path_factory.mktemp("readme") / "desk"
    (folder / "bin").mkdir(parents=True)
    for name in ("imagenet_shards.py", "imagenet_train.py", "requirements.txt", ".gitignore"):
        shutil.copy(TOP / name, folder)
    for name, module in (("python3", ""), ("pip3", "-m pip")):
        (folder / "bin" / name).write_text(f'#!/bin/sh\nPIP_NO_INDEX=1 exec {sys.executable} {module} "$@"\n')
        (folder / "bin" / name).chmod(0o755)
    (folder / "tree").symlink_to(tree)
    for path, kind in itertools.product(tree.glob("*/n*"), ("cat", "dog")):  # the ten classes under two names each
        shutil.copytree(path, folder / "pet-images" / path.parent.name / f"{kind}-{path.name}")
    model, downloads = SMALL[0].removeprefix("--model="), folder.parent / "hub/hub/checkpoints"
    downloads.mkdir(parents=True)
    url = torchvision.models.get_model_weights(model).DEFAULT.url
    torch.save(torchvision.models.get_model(model).state_dict(), downloads / url.rpartition("/")[2])
    for command, epochs in (("git init -q && git add -A", 1), (PACK, 1), (TRAIN, 1), (f"{TRAIN} --resume", 2)):
        out = execute(folder, command, epochs=epochs)
    assert re.search(r"in epoch 2 after 0 of .*validated 30/30 images.*\(epoch 2, step 30\)", out, re.DOTALL)
    (folder.parent / "theirs").mkdir()
    for path, name in zip(sorted(folder.glob("data/*.tar")), ("train-0", "train-1", "validation-0")):
        os.link(path, folder.parent / f"theirs/imagenet1k-{name}.tar")
    return folder


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_commands_as_they_stand(desk, tmp_path, case):
    (tmp_path / "bucket").mkdir()
    servers = {
        "http": lambda: places.nginx(desk / "data"), "s3": lambda: places.s3("bucket"),
        "gs": lambda: places.gcs(tmp_path), "hub": lambda: fault_server(desk.parent / "theirs"),
    }  # fmt: skip
    place = next((words for words in servers if words in " ".join(case)), None)
    with servers[place]() if place else nullcontext({}) as found:
        server, env = (found, {}) if place == "http" else (SERVER, found)
        env = {"HF_ENDPOINT": found.url.rstrip("/")} if place == "hub" else env
        out = "".join(execute(desk, command, server, **env) for words in case for command in commands_with(words))
    assert re.search(CASES[case], out, re.DOTALL), out
    assert "--cache" not in case or any((desk.parent / "cache").iterdir())
    assert "?? " not in execute(desk, "git status --porcelain"), "add it to .gitignore"


@pytest.mark.long
def test_demo(tmp_path):
    """In a checkout that has nothing but the virtual environment: the promised accuracy, then the Python blocks."""
    (tmp_path / "tests").mkdir()
    for name in ("run", "config.sh", "requirements.txt", "imagenet_shards.py", "imagenet_train.py", "tests/standin.py"):
        shutil.copy(TOP / name, tmp_path / name)
    (tmp_path / ".venv").symlink_to(Path(sys.prefix))
    assert (tmp_path / ".venv" / "installed-requirements.txt").exists(), "./run test makes it; run the tests with it"
    run = subprocess.run(["./run", "demo"], cwd=tmp_path, capture_output=True, text=True, timeout=800)
    assert run.returncode == 0 and "Warning" not in run.stderr, run.stderr[-2000:]
    results = re.findall(r"validated 300/300 images: top-1 ([\d.]+) %", run.stdout)
    assert len(results) == 4 and float(results[-1]) > 90
    kept = [tmp_path / name for name in re.findall(r"demo/[\w/]+\.\w+", run.stdout.splitlines()[-1])]
    assert {path.name for path in kept if path.exists()} == {"preview.png", "metrics.csv", "last.ckpt", "best.ckpt"}
    shapes = ("3, 224, 224", 1000), ("3, 224, 224", 2 * 500), ("224, 224, 3", 2 * 960)
    for block, (shape, images) in zip(code("python"), shapes, strict=True):
        env = os.environ | {"WIDS_CACHE": f"{tmp_path}/copies"}
        run = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert run.returncode == 0 and "Warning" not in run.stderr, run.stderr[-2000:]
        assert sum(map(int, re.findall(rf"torch.Size\(\[(\d+), {shape}\]\)", run.stdout))) == images
    assert not [*tmp_path.glob("copies/*")]


# ---------------------------------------------------------------- when a loss is silent


def read_with_webdataset(url: str | Path) -> list[str]:
    """The keys of the samples, as WebDataset reads a shard."""
    return [sample["__key__"] for sample in wds.WebDataset([str(url)], shardshuffle=False, empty_check=False)]


def test_webdataset_loses_samples_in_silence_if_a_stream_ends_between_members(shards, tmp_path):
    """A truncated file; a command that ends its output before its exit status comes. Here, both are an error."""
    path = shutil.copytree(shards, tmp_path / "data") / "imagenet-train-000001.tar"
    keys, at = read_with_webdataset(path), tarfile.open(path).getmembers()[2 * 4].offset
    os.truncate(path, at + 600)  # within a member
    with pytest.raises(tarfile.ReadError):
        read_with_webdataset(path)
    os.truncate(path, at)
    command = f"cat {path}; exec >&-; sleep 0.5; exit 18"
    assert read_with_webdataset(path) == read_with_webdataset(f"pipe:{command}") == keys[:4] != keys
    commands = f"pipe:case %s in {path.name}) {command};; *) cat {shards}/%s;; esac"
    for prefix, message in ((str(path.parent), "found"), (commands, "exit status 18")):
        index = script.read_index(prefix, "train")
        with pytest.raises(UserError, match=f"{path.name}.*{message}"):
            list(script.Loader(script.LoaderConfig(index, True, BATCH, 32, retry_for=0)))


# ---------------------------------------------------------------- changes to the script


def numbered(diff: str) -> str:
    """The diff with the line numbers that the lines have now."""
    shift = 0

    def number(hunk: re.Match) -> str:
        nonlocal shift
        old, new = ([x[1:] for x in hunk[2].splitlines(True) if x[0] in kinds] for kinds in (" -", " +"))
        line, at = SCRIPT[: SCRIPT.index("".join(old))].count("\n") + 1, shift
        shift += len(new) - len(old)
        return f"@@ -{line},{len(old)} +{line + at},{len(new)} @@{hunk[1]}{hunk[2]}"

    return re.sub(r"^@@ .* @@(.*\n)((?:[ +-].*\n)+)", number, diff, flags=re.MULTILINE)


def changed_script(folder: Path, *diffs: str) -> Path:
    """A copy of imagenet_train.py with changes of the README, applied as it says."""
    for name in ("imagenet_shards.py", "imagenet_train.py"):
        shutil.copy(TOP / name, folder)
    for diff in diffs:
        subprocess.run(["git", "apply"], cwd=folder, input=diff, text=True, check=True)
    return folder / "imagenet_train.py"


def test_changes_apply_without_an_offset(tmp_path):
    """With RENUMBER=1 in the environment, README.md gets the line numbers of now."""
    if os.environ.get("RENUMBER"):
        text = re.sub(r"(?<=```diff\n).*?(?=```)", lambda match: numbered(match[0]), README, flags=re.DOTALL)
        (TOP / "README.md").write_text(text)
        pytest.skip("README.md has the new numbers; run the tests again")
    changed_script(tmp_path)
    for diff in code("diff"):
        git = ["git", "apply", "--check", "-v"]
        run = subprocess.run(git, cwd=tmp_path, input=diff, capture_output=True, text=True, check=True)
        assert "offset" not in run.stderr, "run this test with RENUMBER=1"


def test_an_augmentation_does_not_depend_on_the_workers(shards, tmp_path, monkeypatch):
    changed_script(tmp_path, code("diff")[0]).rename(tmp_path / "changed_train.py")
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


def test_all_changes_together_train_and_evaluate(shards, tmp_path):
    timm, _ = pytest.importorskip("timm"), pytest.importorskip("wandb")
    command = [sys.executable, changed_script(tmp_path, *code("diff")), "--model=resnet18d", *SMALL[1:], "--workers=1"]
    env = os.environ | {"WANDB_MODE": "offline"}
    for flags in (["--max-epochs=1"], ["--evaluate", "--weights=output/version_0/model.pt"]):
        command += [f"--shards={shards}", *flags]
        run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert run.returncode == 0 and "validated 30/30 images" in run.stdout, run.stderr[-2000:]
    folder = tmp_path / "output" / "version_0"
    timm.create_model("resnet18d", num_classes=10).load_state_dict(torch.load(folder / "model.pt", weights_only=True))
    [log] = folder.glob("wandb/offline-run-*/*.wandb")
    assert b"val_top1" in log.read_bytes() and (folder / "metrics.csv").exists()
