"""One way to die: SIGTERM, SIGINT or a launcher's end ends every process of a run at once, and leaves none."""

import os
import re
import signal
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import runs
from runs import assert_all_ended, checkpoint, exit_codes, launch, log, run, start, wait_for

TERM, INT, KILL, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGKILL, signal.SIGUSR1
# A command that stalls in the ranks of $STALLS when it is to read a file of this kind, after making a file for each.
STALLING = "pipe:case %s:$STALLS in *{kind}*.tar:*${{LOCAL_RANK:-0}}*) touch {folder}/stalled-${{LOCAL_RANK:-0}}; " \
           "sleep 60;; esac; cat {shards}/%s"
SLURM = dict(SLURM_NTASKS="1", SLURM_JOB_NAME="train", SLURM_JOB_ID="1", SLURM_PROCID="0", SLURM_LOCALID="0",
             SLURM_NODEID="0", SLURM_NTASKS_PER_NODE="1")


@pytest.fixture(scope="module")
def begun(unique, tmp_path_factory) -> Path:
    """A run of which one step is saved."""
    folder = tmp_path_factory.mktemp("begun")
    run(folder, f"--shards={unique}", "--max-steps=1", runs.SMALL[0])
    return folder


def send(process, number: int) -> float:
    """Send a signal; seconds until the process has ended."""
    begin = time.monotonic()
    os.kill(process.pid, number)
    process.wait(60) if hasattr(process, "wait") else process.join(60)
    return time.monotonic() - begin


def last_line(folder: Path) -> str:
    """What rank 0 said last; there must be no traceback, and no other line about a signal."""
    text = log(folder)
    assert "Traceback" not in text and len(re.findall("^imagenet_train.py: SIG", text, re.M)) <= 1, text
    return text.splitlines()[-1] if text else ""


@pytest.mark.parametrize("number", [TERM, INT])
def test_while_pytorch_is_imported(unique, tmp_path, number):
    """As soon as the script catches SIGTERM, which is before the imports that take seconds."""
    process = launch(tmp_path, f"--shards={unique}")
    status = Path(f"/proc/{process.pid}/status")
    while not int(re.search(r"SigCgt:\s*(\w+)", status.read_text())[1], 16) >> (TERM - 1) & 1:
        time.sleep(0.005)
    assert "torch" not in Path(f"/proc/{process.pid}/maps").read_text()
    send(process, number)
    assert process.returncode == 128 + number
    assert log(tmp_path) == f"imagenet_train.py: {signal.Signals(number).name}: there is no checkpoint yet\n"


@pytest.mark.parametrize("number, env", [(TERM, {}), (INT, {}), (USR1, SLURM)], ids=["TERM", "INT", "USR1 of Slurm"])
def test_while_it_trains(unique, tmp_path, begun, number, env):
    """A run that makes steps, with its loader processes. Lightning's own handlers would save or requeue."""
    flags = [f"--shards={unique}", "--max-epochs=500", f"--resume={begun}/out/version_0", "--workers=2"]
    process = launch(tmp_path, *flags, env=env)
    wait_for(tmp_path / "log-0", "Epoch 1/500, step 4/")
    send(process, number)
    assert process.returncode == 128 + number and not list(tmp_path.rglob("hpc_ckpt*"))
    hint = "--resume continues from .*/out/version_0/last.ckpt|there is no checkpoint yet"
    assert re.fullmatch(f"imagenet_train.py: {signal.Signals(number).name}: ({hint})", last_line(tmp_path))
    assert_all_ended(tmp_path)


@pytest.mark.parametrize("kind, more", [("train", []), ("val", []), ("val", ["--evaluate"])])
def test_while_data_stalls(unique, tmp_path, begun, kind, more):
    """In training, in its validation and in an evaluation, while the main process waits for a batch."""
    shards = STALLING.format(shards=unique, kind=kind, folder=tmp_path)
    flags = [f"--shards={shards}", runs.SMALL[0], f"--output={begun}/out", "--resume", "--max-epochs=1", *more]
    [process] = start(tmp_path, *flags, env={"STALLS": "0"})
    wait_for(tmp_path / "stalled-0")
    before = checkpoint(begun)["global_step"]
    assert send(process, TERM) < 5 and process.exitcode == 143, log(tmp_path)
    assert last_line(tmp_path).endswith(f"SIGTERM: --resume continues from {begun}/out/version_0/last.ckpt")
    assert checkpoint(begun)["global_step"] == before  # nothing is saved on a signal


def test_while_a_checkpoint_is_written(unique, tmp_path, monkeypatch):
    """Just before the new file gets its name: the previous one stays, and the next run removes the other."""
    flags = [f"--shards={unique}", "--max-epochs=1", "--checkpoint-every=1", "--resume"]
    run(tmp_path, *flags, "--max-steps=2")
    fsync = os.fsync

    def fsync_and_end(descriptor: int) -> None:
        fsync(descriptor)
        os.kill(os.getpid(), TERM)
        time.sleep(60)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync_and_end)
        run(tmp_path, *flags, expect=143)
    assert "SIGTERM: --resume continues from" in last_line(tmp_path)
    assert checkpoint(tmp_path)["global_step"] == 2 and len(list(tmp_path.rglob("last.ckpt.tmp-*"))) == 1
    run(tmp_path, *flags)
    assert checkpoint(tmp_path)["global_step"] == 11 and not list(tmp_path.rglob("*.tmp-*"))


def test_control_c_at_a_terminal(unique, tmp_path, monkeypatch):
    """The terminal sends it to the whole group of processes: main process, loader processes, commands."""
    words = [*runs.SMALL, f"--shards=pipe:cat {unique}/%s", f"--output={tmp_path}/out", "--workers=2"]
    monkeypatch.setenv("LAUNCHED", str(tmp_path))
    command = partial(os.execv, sys.executable, [sys.executable, runs.SCRIPT, *words])
    status, output = runs.in_terminal(80, command, "Epoch 2/90", b"\x03")
    assert status == 130 and "Traceback" not in output
    assert re.search(r"\nimagenet_train.py: SIGINT: --resume continues from .*/last.ckpt\n$", output), output[-300:]
    assert_all_ended(tmp_path)


# ---------------------------------------------------------------- two ranks


@pytest.mark.long
@pytest.mark.parametrize("launcher, number, stalls", [
    ("torchrun", TERM, "1"), ("torchrun", INT, ""), ("lightning", TERM, "0"), ("lightning", KILL, "1"),
])
def test_two_ranks(unique, tmp_path, launcher, number, stalls):
    """One rank waits for a shard and the other one for that rank, in a collective; or both make steps."""
    shards = STALLING.format(shards=unique, kind="train", folder=tmp_path)
    flags = [f"--shards={shards}", "--max-epochs=500", "--checkpoint-every=1"]
    process = launch(tmp_path, *flags, launcher=launcher, env={"STALLS": stalls})
    wait_for(*(tmp_path / f"stalled-{stalls}", "") if stalls else (tmp_path / "log-0", "Epoch 3/500, step 2"))
    assert send(process, number) < 10
    assert_all_ended(tmp_path)
    text = log(tmp_path)
    if launcher == "lightning":
        assert process.returncode == (-number if number == KILL else 128 + number)
        assert "Traceback" not in text
    said = re.findall(r"^imagenet_train.py: .*", text, re.M)
    hint = f"--resume continues from {tmp_path}/out/version_0/last.ckpt" if not stalls else "there is no checkpoint yet"
    assert said == [] if number == KILL else [f"imagenet_train.py: {signal.Signals(number).name}: {hint}"], text


def test_when_rank_0_fails_the_ranks_that_it_started_end(unique, tmp_path):
    """Rank 1 waits for its data, so that it does not notice."""
    command = f"pipe:case %s:$LOCAL_RANK in *train*.tar:1) sleep 60;; *train*.tar:*) exit 7;; esac; cat {unique}/%s"
    process = launch(tmp_path, f"--shards={command}", "--retry-for=0", launcher="lightning")
    assert process.wait(100) == 1, log(tmp_path)
    assert_all_ended(tmp_path)
    assert "exit status 7" in log(tmp_path) and "Traceback" not in log(tmp_path)


def test_when_a_rank_fails_the_other_one_says_so_in_one_line(unique, tmp_path):
    command = f"pipe:case %s:$RANK in *train*.tar:1) exit 7;; esac; cat {unique}/%s"
    assert exit_codes(start(tmp_path, f"--shards={command}", "--retry-for=0", ranks=2)) == [1, 1]
    assert "exit status 7" in log(tmp_path, 1) and "Traceback" not in log(tmp_path)
    assert log(tmp_path, 0).endswith("imagenet_train.py: another rank ended; its message says why\n")
