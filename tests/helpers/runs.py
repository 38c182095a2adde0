"""Runs imagenet_train.py on small shards: main() in this process or in forked ones, or the script as its users do.

train() calls main() in this process. start() and run() call it in forked processes, one for each rank, which keep a
diary. launch() starts the script itself; that takes 5 s of CPU to import PyTorch, which forked processes have done.
"""

import contextlib
import csv
import fcntl
import json
import multiprocessing
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import pytorch_lightning as pl
import tiny  # noqa: F401
import torch
from conftest import forked
from torch.utils._python_dispatch import TorchDispatchMode

import imagenet_train as script

SCRIPT = Path(script.__file__)
BATCH = 4
SMALL = ["--model=shufflenet_v2_x0_5", "--train-size=32", "--val-size=32", "--val-resize=36", f"--batch-size={BATCH}",
         "--shuffle=5", "--log-every=2", "--accelerator=cpu"]
TINY = ["--model=tiny", *SMALL[1:]]  # see tiny.py
Moment = tuple[str, int]  # ("train", step) or ("val", epoch)


def train(shards: Path | str, output: Path, *flags: str) -> int:
    """An epoch in this process; its exit status."""
    return script.main([*TINY, f"--shards={shards}", f"--output={output}", "--workers=0", "--max-epochs=1", *flags])


def one_line(capsys) -> str:
    """What was printed on stderr, which must be one line of the script."""
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert line.startswith("imagenet_train.py: "), line
    return line


# ---------------------------------------------------------------- forked ranks, with a diary


class Reads(TorchDispatchMode):
    """Counts when a number is read off a tensor, for which one waits for the device. On a CPU too."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        Reads.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class Diary(pl.Callback):
    """folder/rank-R.jsonl gets a line [epoch, step, "train" or "val", labels, numbers read so far] a batch.

    With a tree of one image a class a label names an image. The process gets a SIGKILL at the moment `kill`.
    """

    def __init__(self, folder: Path, kill: Moment | None) -> None:
        self.folder, self.kill = folder, kill

    def write(self, trainer: pl.Trainer, kind: str, batch: list, moment: int) -> None:
        if self.kill == (kind, moment):
            os.kill(os.getpid(), signal.SIGKILL)
        line = [trainer.current_epoch, trainer.global_step, kind, batch[1].tolist(), Reads.count]
        with open(self.folder / f"rank-{trainer.global_rank}.jsonl", "a") as file:
            print(json.dumps(line), file=file)

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: list, *number) -> None:
        self.write(trainer, "train", batch, trainer.global_step)

    def on_validation_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: list, *number) -> None:
        self.write(trainer, "val", batch, trainer.current_epoch)


def run_rank(folder: Path, flags: list[str], env: dict[str, str], kill: Moment | None, reads: bool) -> None:
    """In a forked process: the script as `python imagenet_train.py` runs it, with a diary, printing into log-RANK."""
    forked()
    os.environ |= env
    sys.argv = ["imagenet_train.py", *flags]
    make_trainer = script.make_trainer

    def with_diary(args) -> pl.Trainer:
        trainer = make_trainer(args)
        trainer.callbacks.append(Diary(folder, kill))
        return trainer

    script.make_trainer = with_diary
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as the script does at its start
    script.join_launcher(os.environ)
    with open(folder / f"log-{env.get('RANK', 0)}", "a", buffering=1) as sys.stdout:
        sys.stderr = sys.stdout
        with Reads() if reads else contextlib.nullcontext():
            os._exit(script.main(flags))


def start(
    folder: Path, *flags: str, ranks: int = 1, workers: int = 1, kill: Moment | None = None, reads: bool = False,
    each: Callable[[int], list[str]] = lambda rank: [], env: dict[str, str] | None = None,
) -> list[BaseProcess]:
    """Start ranks in the environment that torchrun gives them. each: a rank's own flags, beside those of all."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    processes = []
    for rank in range(ranks):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": 0,
               "GROUP_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
        own = {key: str(value) for key, value in own.items()} if ranks > 1 else {}
        words = [*TINY, f"--workers={workers}", f"--output={folder}/out", *flags, *each(rank)]
        args = folder, words, own | (env or {}), kill, reads
        processes.append(multiprocessing.get_context("fork").Process(target=run_rank, args=args))
        processes[-1].start()
    return processes


def exit_codes(processes: list[BaseProcess]) -> list[int]:
    """Wait for the ranks; a rank that hangs is killed."""
    for process in processes:
        process.join(100)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def run(folder: Path, *flags: str, expect: int = 0, **options) -> str:
    """start() ranks and wait; the exit status of each must be `expect`. Returns what rank 0 printed."""
    codes = exit_codes(start(folder, *flags, **options))
    assert codes == [expect] * len(codes), log(folder)
    return log(folder, 0)


# ---------------------------------------------------------------- the script itself


def launch(
    folder: Path, *flags: str, launcher: str = "python", env: dict[str, str] | None = None, ignored: int = 0
) -> subprocess.Popen:
    """Start the script; see processes_of() for what it started. It prints into folder/log-0.

    launcher: "python", one rank; or two ranks, started by "torchrun", or by "lightning", that is by the first one
    ignored: a signal that the script's parent ignores
    """
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-u"]
    command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] * (launcher == "torchrun")
    more = ["--devices=2"] if launcher == "lightning" else []
    words = [*SMALL, "--workers=1", f"--output={folder}/out", *more, *flags]
    with open(folder / "log-0", "a") as output:
        env = os.environ | {"LAUNCHED": str(folder)} | (env or {})
        ignore = (lambda: signal.signal(ignored, signal.SIG_IGN)) if ignored else None
        return subprocess.Popen([*command, SCRIPT, *words], env=env, stdin=subprocess.DEVNULL, stdout=output,
                                stderr=output, start_new_session=True, preexec_fn=ignore)


def processes_of(folder: Path) -> dict[int, str]:
    """The processes that launch() started for a folder, and theirs, with their command lines."""
    left = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile, or is not ours
            if f"LAUNCHED={folder}\0".encode() in (path / "environ").read_bytes():
                left[int(path.name)] = (path / "cmdline").read_text().replace("\0", " ")
    return left


def assert_all_ended(folder: Path) -> None:
    """Within 10 s none of these processes is left."""
    give_up = time.monotonic() + 10
    while processes_of(folder) and time.monotonic() < give_up:
        time.sleep(0.05)
    assert not processes_of(folder)


def in_terminal(columns: int, run: Callable[[], int], pattern: str = "", keys: bytes = b"") -> tuple[int, str]:
    """Call run() in a forked process in a terminal of so many columns; press keys when the output matches a pattern.

    Returns the exit status and all that was written to the terminal.
    """
    pid, terminal = pty.fork()
    if pid == 0:
        sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)  # not pytest's
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        forked()
        os._exit(run())
    data = b""
    with contextlib.suppress(OSError):  # how Linux reports that the other side was closed
        while part := os.read(terminal, 1 << 16):
            data += part
            if keys and re.search(pattern, data.decode(errors="replace")):
                os.write(terminal, keys)
                keys = b""
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), data.decode().replace("\r\n", "\n")


# ---------------------------------------------------------------- what runs leave


def log(folder: Path, *ranks: int) -> str:
    """What these ranks printed; without numbers, all of them."""
    paths = [folder / f"log-{rank}" for rank in ranks] if ranks else sorted(folder.glob("log-*"))
    return "".join(path.read_text() for path in paths if path.exists())


def wait_for(path: Path, pattern: str = "") -> None:
    """Wait until the file is there and matches the pattern."""
    for _ in range(6000):
        if path.exists() and re.search(pattern, path.read_text(errors="replace")):
            return
        time.sleep(0.02)
    pytest.fail(f"{pattern!r} never came in {path}: {log(path.parent)[-2000:]}")


def diary(folder: Path, rank: int = 0) -> list[list]:
    """The lines of a rank's diary; a kill may cut the last one."""
    lines = (folder / f"rank-{rank}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("]")]


def batches(folder: Path, rank: int, kind: str, epoch: int) -> list[list[int]]:
    """The labels of every batch that a rank got in an epoch."""
    return [labels for e, _, k, labels, _ in diary(folder, rank) if (k, e) == (kind, epoch)]


def steps(folder: Path, rank: int = 0) -> dict[int, list[int]]:
    """Step → labels of its batch. A step that was repeated after a kill must have got the same batch."""
    made: dict[int, list[int]] = {}
    for _, step, kind, labels, _ in diary(folder, rank):
        assert kind != "train" or made.setdefault(step, labels) == labels
    return made


def rows(folder: Path) -> list[dict[str, str]]:
    """The entries of the one metrics.csv below a folder."""
    [path] = folder.rglob("metrics.csv")
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def checkpoint(folder: Path, name: str = "last.ckpt") -> dict:
    """The one of this name below the folder."""
    [path] = folder.rglob(name)
    return torch.load(path, weights_only=True)


def assert_same_weights(a: Path, b: Path) -> None:
    """Of the last checkpoints of two runs."""
    ours, theirs = (checkpoint(folder)["state_dict"] for folder in (a, b))
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == [] and ours.keys() == theirs.keys()
