"""The benchmarks run and print what they promise; their figures are for those who run them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import imagenet_train as script

FOLDER = Path(__file__).parent / "benchmarks"
sys.path.append(str(FOLDER))

import gpu  # noqa: E402
import limit  # noqa: E402
import loading  # noqa: E402

BATCH = 4
SMALL = ["--model=shufflenet_v2_x0_5", "--train-size=32", "--val-size=32", "--val-resize=36", f"--batch-size={BATCH}",
         "--accelerator=cpu", "--workers=1"]
RUNS = {
    "loading": (["--tree={tree}", "--images=60", "--rounds=1", "--batch=8",
                 "--only=project-bytes,webdataset-bytes,project-floats"],
                r"\| project \| bytes \| 2 \| \d+ \|.*\n\| webdataset \| bytes .*\n\| project \| floats \| 2 \| "),
    "sharding": (["--tree={tree}", "--rounds=1", "--workers=1"],
                 r"60 images, .*\n(.* CPU s .* MB\n)*ours, 1 workers .* CPU s .* MB"),
    "accuracy": (["--tree={tree}", "--classes=2", "--epochs=1", "--seeds=2", "--size=32", "--resize=36",
                  "--batch-size=4", "--workers=0", "--model=squeezenet1_1"],
                 r"\| 1 \| [\d.]+ \| [\d.]+ \| .*\n\| mean .* ± [\d.]+ \| [\d.]+ ± .*\ndifference of the means: [+-]"),
    "order": (["--blocks=256", "--shuffles=2000", "--images=70000"],
              r"\| blocks of 256 \| [\d.]+ \| [\d.]+ \|\n\| whole shards .*\n[^$]*\| 1,024 \| [\d.]+ \|"),
    "sources": (["--shards={shards}", "--rounds=1"], r"\| nginx, in ranges \| [\d,]+ \| [\d,]+ \|\n"),
}  # fmt: skip


def run(name: str, *flags: str | Path, timeout: float = 300) -> str:
    """What a benchmark prints; it must succeed."""
    command = [sys.executable, FOLDER / f"{name}.py", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("name", RUNS)
def test_a_benchmark_runs(name, tree, shards):
    flags, expected = RUNS[name]
    printed = run(name, *(flag.format(tree=tree, shards=shards) for flag in flags))
    assert re.search(expected, printed), printed


def test_floats_are_the_normalised_bytes(shards):
    """loading.py's rows of bytes and of floats load the same images."""
    config = script.LoaderConfig(script.read_index(str(shards), "train"), True, BATCH, 32)
    samples = [(torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8), label) for label in range(BATCH)]
    images, labels, _ = loading.Floats(config)(samples)
    mean, std = (255 * torch.tensor(values).view(3, 1, 1) for values in (script.MEAN, script.STD))
    expected = (torch.stack([pixels for pixels, _ in samples]).permute(0, 3, 1, 2) - mean) / std
    assert torch.allclose(images, expected, atol=1e-5) and list(labels) == list(range(BATCH))


# ---------------------------------------------------------------- gpu.py


@pytest.mark.long
def test_every_step_of_the_gpu_script_runs(tmp_path):
    """On a CPU, with tiny sizes: all steps give figures, none fails, and no process is left."""
    printed = run("gpu", f"--out={tmp_path / 'out'}", "--tiny", f"--work={tmp_path}", timeout=600)
    figures = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert "failed" not in printed and "killed, out of time" not in printed, printed
    assert figures["ended by SIGKILL after a checkpoint"]["value"] == "True"
    assert figures["resumed"]["value"] == figures["train"]["value"] != "no validation"
    assert figures["images from the buffers of 8 workers"]["value"] == "60 the same, 0 others"
    assert all(figures[name]["value"] > 0 for name in ("bare", "ours", "together", "ours, compiled", "ddp"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    commands = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(tmp_path) not in commands


def test_a_step_that_fails_or_takes_too_long_is_a_line(tmp_path):
    printed = run("gpu", f"--out={tmp_path}", "--tiny", "--only=speed", "--budget=300")
    assert "speed: failed: " in printed and "| speed: failed |" in (tmp_path / "gpu.txt").read_text()
    assert "machine: no time left" in run("gpu", f"--out={tmp_path}", "--tiny", "--only=machine", "--budget=1")


def test_a_trace_is_described():
    """Waits, copies, and the share of time without a kernel; what the profiler does at its end does not count."""
    def event(cat: str, name: str, ts: float, dur: float = 1) -> dict:
        return {"cat": cat, "name": name, "ts": ts, "dur": dur}

    events = [event("cuda_runtime", "cudaLaunchKernel", 0), event("kernel", "conv", 10, 30), event("kernel", "add", 20),
              event("cpu_op", "aten::_local_scalar_dense", 30), event("cuda_runtime", "cudaLaunchKernel", 31),
              event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 45), event("kernel", "bn", 80, 30),
              event("cuda_runtime", "cudaDeviceSynchronize", 90)]
    assert gpu.describe(events, 2) == {
        "waits (goal: none)": "1 × aten::_local_scalar_dense", "copies": "1 × Memcpy HtoD (Pinned -> Device)",
        "device idle": "40.00 % of 0.05 ms a step", "kernels a step": "2"}


def test_drawn_pictures_are_as_large_as_photographs_of_imagenet(tmp_path):
    """110,364 bytes on average, as 250 images of ImageNet have, within 15 %."""
    for number in range(40):
        gpu.draw(tmp_path / f"{number}.JPEG")
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert 0.85 < sum(sizes) / len(sizes) / 110_364 < 1.15
    with Image.open(tmp_path / "0.JPEG") as image:
        assert image.mode == "RGB" and min(image.size) >= 300


# ---------------------------------------------------------------- limit.py

LINES = (
    r"loader alone +[\d,.]+ images/s, [\d,.]+ MB/s read\n"
    r"step alone +[\d,.]+ images/s, with a batch that is on cpu already\n"
    r"both together +[\d,.]+ images/s, \d+% of the slower one\n"
    r"memory +[\d.]*[1-9][\d.]* GB in the main process, [\d.]*[1-9][\d.]* GB in a loader process\n"
    r"(step|input)-bound: .*\n$"
)


def test_what_limits(shards, capsys):
    assert limit.main([*SMALL, f"--shards={shards}", "--steps=3"]) == 0
    assert re.search(LINES, capsys.readouterr().out)


def test_what_limits_two_ranks(shards):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    flags = [*SMALL, f"--shards={shards}", "--steps=1", "--devices=2"]
    done = subprocess.run([*torchrun, FOLDER / "limit.py", *flags], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(LINES, done.stdout)


def test_too_few_images_to_measure(shards, capsys):
    flags = [flag for flag in SMALL if "--batch-size" not in flag]
    assert limit.main([*flags, f"--shards={shards}", "--batch-size=61"]) == 1
    assert "limit.py: --batch-size=61" in capsys.readouterr().err


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
    assert len(batches) == 60 // BATCH and {id(images) for images, _ in batches} == {id(batches[0][0])}
    assert batches[0][0].shape == (BATCH, 32, 32, 3) and batches[0][0].dtype == torch.uint8
    assert batches[0][1].shape == (BATCH,) and batches[0][1].max() < 10
