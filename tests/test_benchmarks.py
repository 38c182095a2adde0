"""The benchmarks run and print what they promise; their figures are for those who run them."""

import json
import re
import subprocess
import sys
from itertools import repeat
from pathlib import Path

import pytest
import torch

import imagenet_train as script

FOLDER = Path(__file__).parent / "benchmarks"
sys.path.append(str(FOLDER))

import loading  # noqa: E402

RUNS = {  # command → first columns of rows that it prints, before a figure
    "loading --tree={tree} --images=60 --rounds=1 --batch=8 --only=project-bytes,project-floats,pillow":
        ["project | bytes", "project | floats", "pillow | nothing"],
    "loading --tree={tree} --images=60 --rounds=1 --batch=8 --parts": ["load", "resize_pixels", "the whole pipeline"],
    "disk --tree={tree} --images=20 --rounds=1": ["files", "shards"],
    "sources --shards={shards} --rounds=1": ["folder", "nginx, in ranges", "s3:// (moto)", "gs:// (fake-gcs-server)"],
    "sharding --tree={tree} --rounds=1 --workers=1": ["a loop over ShardWriter", "GNU tar", "ours, 1 workers"],
    "fullsize --images=300,60 --maxcount=100": ["the same, resumed", "--verify", "read_index()", "plan_reader()"],
    "order --blocks=256 --shuffles=2000 --images=70000": ["blocks of 256", "whole shards (a command)", "1,024"],
    "accuracy --tree={tree} --epochs=1 --seeds=1 --size=32 --resize=36 --batch-size=4 --workers=0 "
    "--model=squeezenet1_1": ["0", "mean ± standard deviation"],
}  # fmt: skip


def run(name: str, *flags: str | Path) -> str:
    """What a benchmark prints; it must succeed."""
    done = subprocess.run([sys.executable, FOLDER / f"{name}.py", *flags], capture_output=True, text=True, timeout=600)
    if "needs root" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("command", RUNS)
def test_a_benchmark_runs(command, tree, shards):
    printed = run(*command.format(tree=tree, shards=shards).split())
    for row in RUNS[command]:
        assert re.search(rf"^\| {re.escape(row)} \| [\d.,]+ ", printed, re.MULTILINE), printed


def test_floats_are_the_normalised_bytes():
    """loading.py's rows of bytes and of floats load the same images."""
    rows = [(torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8), label) for label in range(4)]
    buffers = repeat(torch.empty(4, 32, 32, 3, dtype=torch.uint8))
    images, labels, _ = loading.normalise(script.collate)(rows, buffers)
    mean, std = (255 * torch.tensor(values).view(3, 1, 1) for values in (script.MEAN, script.STD))
    expected = (torch.stack([pixels for pixels, _ in rows]).permute(0, 3, 1, 2) - mean) / std
    assert torch.allclose(images, expected, atol=1e-5) and labels == [0, 1, 2, 3]


@pytest.mark.long
def test_the_gpu_benchmark_runs(tmp_path):
    """On a CPU, with tiny sizes: all steps give figures, none fails, what is killed goes on, and no process is left."""
    printed = run("gpu", f"--out={tmp_path / 'out'}", "--tiny", f"--work={tmp_path}")
    figures = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert "failed" not in printed, printed + (tmp_path / "out" / "log.txt").read_text()[-5000:]
    assert all(figures[name] > 0 for name in ("plain PyTorch", "this script, one batch", "loader, 1 workers, speed"))
    for name in ("SIGKILL", "SIGTERM"):
        assert (figures[f"{name} ends it"], figures[f"{name}: processes left"]) == ("True", "0")
        assert figures[f"{name}, resumed"] == figures["train"] == figures["from s3://"]
    commands = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(tmp_path) not in commands
    sizes = [path.stat().st_size for path in (tmp_path / "drawn").iterdir()]
    assert 0.8 < sum(sizes) / len(sizes) / 110_364 < 1.2  # the average of 250 images of ImageNet


def test_a_step_that_fails_or_takes_too_long_is_a_row(tmp_path):
    assert "| runs: failed |" in run("gpu", f"--out={tmp_path}", "--tiny", "--only=runs", "--budget=1")
