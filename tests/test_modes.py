"""imagenet_train.py's other ways: from the raw files, with growing images, and measuring itself."""

import re

import pytest
import torch
from test_train import BATCH, SMALL, record

import imagenet_train as script
from imagenet_train import LoaderConfig, read_index


def run(*flags: str) -> int:
    """imagenet_train.py in this process; its exit status."""
    return script.main([*SMALL, "--workers=1", *flags])


# ---------------------------------------------------------------- --imagenet


def test_training_from_files(tree, tmp_path, capsys):
    assert run(f"--imagenet={tree}", f"--output={tmp_path}", "--max-epochs=1") == 0
    out = capsys.readouterr().out
    assert "60 train images in 60 files, 30 val in 30" in out and "validated 30/30 images" in out


def test_shards_and_files_at_once_are_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        run("--imagenet=a", "--shards=b")
    assert stop.value.code == 2 and "not allowed with argument" in capsys.readouterr().err


# ---------------------------------------------------------------- --progressive


def test_training_with_growing_images(shards, tmp_path, capsys):
    assert run(f"--shards={shards}", f"--output={tmp_path}", "--max-epochs=2", "--train-size=64", "--progressive=32") == 0
    assert capsys.readouterr().out.count("validated 30/30 images") == 2
    with pytest.raises(SystemExit):
        run(f"--shards={shards}", "--progressive=64")
    assert "--progressive 64 is more than --train-size 32" in capsys.readouterr().err


# ---------------------------------------------------------------- --benchmark

LINES = (
    r"loader alone +[\d,.]+ images/s, [\d,.]+ MB/s read\n"
    r"step alone +[\d,.]+ images/s, with a batch that is on cpu already\n"
    r"both together +[\d,.]+ images/s, \d+% of the slower one\n"
    r"(step|input)-bound: .*\n$"
)


@pytest.mark.parametrize("source", ["shards", "tree"])
def test_benchmark(request, source, tmp_path, capsys):
    where = request.getfixturevalue(source)
    flag = f"--shards={where}" if source == "shards" else f"--imagenet={where}"
    assert run(flag, "--benchmark=3", f"--output={tmp_path}/out") == 0
    assert re.search(LINES, capsys.readouterr().out)
    assert not (tmp_path / "out").exists()


def test_benchmark_of_two_ranks(shards, tmp_path):
    done = record(
        tmp_path, f"--shards={shards}", "--benchmark=1", f"--output={tmp_path}/out", "--batch-size=3", ranks=2, workers="1"
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(LINES, done.stdout)


def test_benchmark_of_too_few_batches(shards, tmp_path, capsys):
    assert run(f"--shards={shards}", "--benchmark", "--batch-size=10") == 1
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
    assert script.verdict(load, step, workers=4, cores=cores, device="cpu").startswith(expected)


def test_one_batch_is_all_that_the_step_is_measured_with(shards):
    reader = LoaderConfig(read_index(str(shards), "train"), True, BATCH, 32)
    batches = list(script.OneBatch(reader, torch.device("cpu")))
    assert len(batches) == reader.steps and {id(images) for images, _ in batches} == {id(batches[0][0])}
    assert batches[0][0].shape == (BATCH, 32, 32, 3) and batches[0][0].dtype == torch.uint8
    assert batches[0][1].shape == (BATCH,) and batches[0][1].max() < 10
