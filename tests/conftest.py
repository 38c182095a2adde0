"""Small real trees and shards, made once a test process."""

import gc
import os
import random
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
from PIL import Image
from tqdm import tqdm

# Before PyTorch comes: tests run on a core each, and OpenMP's threads would not outlive a fork.
os.environ["OMP_NUM_THREADS"] = "1"
TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS), str(TESTS / "helpers"), str(TESTS.parent)]

from standin import make_tree  # noqa: E402

import imagenet_shards  # noqa: E402

TRAIN_IMAGES = VAL_IMAGES = 47  # of the tree in which a label names an image; nothing divides this evenly
# What a machine may lack, and the Debian package that has it.
TOOLS = {"nginx": "nginx-light", "envsubst": "gettext-base", "ip": "iproute2", "pgrep": "procps"}


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    return (os.cpu_count() or 1) + 1  # many tests wait, for a process or for a limit of time


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests first, so that none is left to run alone at the end."""
    items.sort(key=lambda item: "long" not in item.keywords)


def pytest_collection_finish(session: pytest.Session) -> None:
    gc.freeze()  # or each forked process walks through all that is imported, and so copies it


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """Skip what needs a tool that is not installed; but fail if REQUIRE_TOOLS is set."""
    try:
        return (yield)
    except FileNotFoundError as error:
        if error.filename not in TOOLS or "REQUIRE_TOOLS" in os.environ:
            raise
        pytest.skip(f"{error.filename} is not installed; on Debian: apt install {TOOLS[error.filename]}")


pytest_runtest_setup = pytest_runtest_call  # of fixtures too


@pytest.fixture(autouse=True)
def program(request, monkeypatch) -> None:
    """Messages begin with the script's name, which is pytest's where a test calls main() in this process."""
    packing = request.module.__name__.startswith("test_shards")
    monkeypatch.setattr(sys, "argv", ["imagenet_shards.py" if packing else "imagenet_train.py"])
    script = sys.modules.get("imagenet_train")
    if script and request.module.__name__ != "test_train_pictures":  # curves.png takes longer than an epoch here
        monkeypatch.setattr(script, "draw_curves", lambda *args: None)


def convert(tree: Path, folder: Path, *flags: str) -> int:
    """Run imagenet_shards.py in this process; its exit status."""
    workers = [] if any(flag.startswith("--workers") for flag in flags) else ["--workers=2"]
    with mock.patch.object(sys, "argv", ["imagenet_shards.py"]):
        return imagenet_shards.main([f"--imagenet={tree}", f"--shards={folder}", *workers, *flags])


@pytest.fixture
def refused(capfd) -> Callable[..., str]:
    """Runs imagenet_shards.py, which must fail: with so many lines on stderr, which are returned, and nothing else."""

    def run(*flags: str, status: int = 1, lines: int = 1) -> str:
        capfd.readouterr()
        try:
            found = imagenet_shards.main(list(flags))
        except SystemExit as stop:
            found = stop.code
        error = capfd.readouterr().err
        assert (found, error.count("\n")) == (status, lines), error
        assert all(line.startswith("imagenet_shards.py: ") and line.isprintable() for line in error.splitlines())
        return error

    return run


def forked() -> None:
    """To call first in a forked process that may be killed: tqdm's lock is shared and would stay locked."""
    tqdm.set_lock(threading.RLock())
    tqdm.monitor_interval = 0


@pytest.fixture(scope="session")
def tree(tmp_path_factory) -> Path:
    """60 train and 30 val images in 10 classes, with ImageNet's oddities."""
    root = tmp_path_factory.mktemp("standin") / "imagenet"
    make_tree(root, train=6, val=3)
    return root


@pytest.fixture
def copy(tree, tmp_path) -> Path:
    """A copy of the tree, to be changed."""
    return shutil.copytree(tree, tmp_path / "imagenet")


@pytest.fixture(scope="session")
def shards(tree, tmp_path_factory) -> Path:
    """The tree in 9 train and 5 val shards."""
    folder = tmp_path_factory.mktemp("shards")
    assert convert(tree, folder, "--maxcount=7") == 0
    return folder


@pytest.fixture(scope="session")
def blocks(tree, tmp_path_factory) -> Path:
    """The same shards, in blocks of 3 samples."""
    folder = tmp_path_factory.mktemp("blocks")
    assert convert(tree, folder, "--maxcount=7", "--block-size=3") == 0
    return folder


@pytest.fixture(scope="session")
def unique(tmp_path_factory) -> Path:
    """Shards of a tree with one image a class in each split: here a label names an image."""
    root = tmp_path_factory.mktemp("unique")
    for split, images in (("train", TRAIN_IMAGES), ("val", VAL_IMAGES)):
        for i in range(images):
            path = root / "tree" / split / f"n{i:08d}" / f"{split}_{i}.JPEG"
            path.parent.mkdir(parents=True)
            Image.frombytes("RGB", (40, 36), random.Random(str(path.name)).randbytes(40 * 36 * 3)).save(path)
    assert convert(root / "tree", root / "data", "--maxcount=9", "--block-size=4") == 0
    return root / "data"
