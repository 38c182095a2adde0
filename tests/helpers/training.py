"""Runs imagenet_train.py on small shards, in this process or in others, and reads what it left."""

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import tiny  # noqa: F401
from conftest import forked
from warm import python

import imagenet_train as script

HERE = Path(__file__).parent
BATCH = 4
SMALL = ["--model=shufflenet_v2_x0_5", "--train-size=32", "--val-size=32", "--val-resize=36", f"--batch-size={BATCH}",
         "--shuffle=5", "--log-every=2", "--accelerator=cpu"]
TINY = ["--model=tiny", *SMALL[1:]]  # see tiny.py


def diary(folder: Path, rank: int, kind: str, epoch: int | None = None) -> list[list[int]]:
    """The labels of every batch that a rank got."""
    lines = map(json.loads, (folder / f"rank-{rank}.jsonl").read_text().splitlines())
    return [labels for e, _, k, labels in lines if k == kind and epoch in (None, e)]


def record(folder: Path, *args: str, ranks: int = 1, workers: str = "2", **env: str) -> subprocess.CompletedProcess:
    """Run the script under torchrun with a diary; for several numbers of workers one after another."""
    folder.mkdir(exist_ok=True)
    launch = [python()]
    if ranks > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        args = (*args, f"--devices={ranks}")
    return subprocess.run(
        [*launch, HERE / "record.py", *TINY, *args],
        env=os.environ | {"RECORD": str(folder), "WORKERS": workers, "OMP_NUM_THREADS": "1"} | env,
        capture_output=True, text=True, timeout=800,
    )


def train(shards: Path | str, folder: Path, *flags: str) -> int:
    return script.main([f"--shards={shards}", f"--output={folder}", "--workers=0", "--max-epochs=1", *TINY, *flags])


def run_apart(folder: Path, flags: list[str]) -> None:
    """In a process of its own: the script with a diary. What it prints goes to folder/log."""
    forked()
    os.environ |= {"RECORD": str(folder)}
    with open(folder / "log", "a", buffering=1) as sys.stdout:
        sys.stderr = sys.stdout
        import record as recorder

        recorder.folder = folder
        os._exit(script.main([*TINY, "--workers=2", f"--output={folder}/out", *flags]))


def start(folder: Path, *flags: str) -> multiprocessing.Process:
    """The script in a forked process, which saves the seconds of importing PyTorch."""
    folder.mkdir(exist_ok=True)
    process = multiprocessing.get_context("fork").Process(target=run_apart, args=(folder, list(flags)))
    process.start()
    return process
