"""The benchmarks run and print what they promise; their figures are for those who run them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training import BATCH, SMALL
from warm import python

import imagenet_train as script

FOLDER = Path(__file__).parent / "benchmarks"
sys.path.append(str(FOLDER))

import limit  # noqa: E402

RUNS = {
    "loading": (["--tree={tree}", "--images=60", "--rounds=1", "--only=project-u8,project-256-u8", "--batch=8"],
                r"\| project-u8 \| 2 \| \d+ \|.*\n\| project-256-u8 \| 2 "),
    "sharding": (["--tree={tree}", "--rounds=1", "--workers=1"],
                 r"60 images, .*\n(.* CPU s .* MB\n)*ours, 1 workers .* CPU s .* MB"),
    "profile_loading": (["--tree={tree}", "--images=64", "--rounds=1"], r"\| decode \| \d\.\d+ \|"),
    "accuracy": (["--tree={tree}", "--classes=2", "--epochs=1", "--seeds=2", "--size=32", "--resize=36",
                  "--batch-size=4", "--workers=0", "--model=squeezenet1_1"],
                 r"\| 1 \| [\d.]+ \| [\d.]+ \| .*\n\| mean .* ± [\d.]+ \| [\d.]+ ± .*\ndifference of the means: [+-]"),
    "planning": ([], r"planning shards.*14\d shards.*\n.*loading the index"),
    "order": (["--blocks=256", "--buffers=2000", "--images=70000"],
              r"\| blocks of 256 \| \d+ \|\n\| whole shards .*\n[^$]*\| 1,024 \| [\d.]+ \|"),
    "sources": (["--shards={shards}", "--rounds=1"], r"\| nginx, in ranges \| [\d,]+ \| [\d,]+ \|\n"),
    "step": (["--shards={shards}", *SMALL, "--model=squeezenet1_1", "--batch-size=1", "--rounds=1"],
             r"bare +[\d.,]+ images/s .*\nscript .*\nshards +[\d.,]+ images/s"),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_a_benchmark_runs(name, tree, shards):
    flags, expected = RUNS[name]
    command = [python(), FOLDER / f"{name}.py", *(flag.format(tree=tree, shards=shards) for flag in flags)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    assert re.search(expected, run.stdout), run.stdout


# ---------------------------------------------------------------- limit.py

LINES = (
    r"loader alone +[\d,.]+ images/s, [\d,.]+ MB/s read\n"
    r"step alone +[\d,.]+ images/s, with a batch that is on cpu already\n"
    r"both together +[\d,.]+ images/s, \d+% of the slower one\n"
    r"memory +[\d.]*[1-9][\d.]* GB in the main process, [\d.]*[1-9][\d.]* GB in a loader process\n"
    r"(step|input)-bound: .*\n$"
)


def measure(*flags: str) -> int:
    """limit.py in this process; its exit status."""
    return limit.main([*SMALL, "--workers=1", *flags])


@pytest.mark.parametrize("source", ["shards", "tree"])
def test_what_limits(request, source, capsys):
    where = request.getfixturevalue(source)
    flag = f"--shards={where}" if source == "shards" else f"--imagenet={where}"
    assert measure(flag, "--steps=3") == 0
    assert re.search(LINES, capsys.readouterr().out)


def test_what_limits_two_ranks(shards):
    torchrun = [python(), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    flags = [*SMALL, f"--shards={shards}", "--steps=1", "--batch-size=3", "--devices=2", "--workers=1"]
    run = subprocess.run([*torchrun, FOLDER / "limit.py", *flags], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    assert re.search(LINES, run.stdout)


def test_too_few_batches_to_measure(shards, capsys):
    assert measure(f"--shards={shards}", "--batch-size=10") == 1
    assert "an epoch has 6 batches, too few for 7 to warm up" in capsys.readouterr().err


@pytest.mark.parametrize(
    "load, step, cores, expected",
    [
        (1500, 2800, 16, "input-bound: 4 workers give 1,500, cpu takes 2,800: use --workers=8"),
        (1500, 2800, 6, "input-bound: cpu takes 2,800, for which it needs 8 workers a rank on as many cores, not 6"),
        (5600, 2800, 6, "step-bound: cpu takes 2,800, the loader would give 2.0 times as many"),
    ],
)
def test_the_verdict(load, step, cores, expected):
    assert limit.verdict(load, step, workers=4, cores=cores, device="cpu").startswith(expected)


def test_one_batch_is_all_that_the_step_is_measured_with(shards):
    config = script.LoaderConfig(script.read_index(str(shards), "train"), True, BATCH, 32)
    batches = list(limit.OneBatch(config, torch.device("cpu")))
    assert len(batches) == config.steps and {id(images) for images, _ in batches} == {id(batches[0][0])}
    assert batches[0][0].shape == (BATCH, 32, 32, 3) and batches[0][0].dtype == torch.uint8
    assert batches[0][1].shape == (BATCH,) and batches[0][1].max() < 10
