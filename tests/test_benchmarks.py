"""The benchmarks run and print what they promise; their figures are for those who run them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_train import SMALL

FOLDER = Path(__file__).parent / "benchmarks"
RUNS = {
    "loading": (["--tree={tree}", "--images=60", "--rounds=1", "--only=project-u8,project-256-u8", "--batch=8"],
                r"\| project-u8 \| 2 \| \d+ \|.*\n\| project-256-u8 \| 2 "),
    "sharding": (["--tree={tree}", "--rounds=1", "--workers=1"], r"60 images, .*\n(.* CPU s\n)*ours, 1 workers .* CPU s"),
    "profile_loading": (["--tree={tree}", "--images=64", "--rounds=1"], r"\| decode \| \d\.\d+ \|"),
    "planning": ([], r"planning shards.*14\d shards.*\n.*loading the index"),
    "step": (["--shards={shards}", *SMALL, "--model=squeezenet1_1", "--batch-size=1", "--rounds=1"],
             r"bare +[\d.,]+ images/s .*\nscript .*\nshards +[\d.,]+ images/s"),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_a_benchmark_runs(name, tree, shards):
    flags, expected = RUNS[name]
    command = [sys.executable, FOLDER / f"{name}.py", *(flag.format(tree=tree, shards=shards) for flag in flags)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    assert re.search(expected, run.stdout), run.stdout
