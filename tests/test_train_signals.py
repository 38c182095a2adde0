"""One way to die: a signal or a launcher's end ends every process of a run at once, by the kernel, and leaves none."""

import fcntl
import os
import re
import select
import signal
import subprocess
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


def end(process, number: int) -> None:
    """Send a signal, of which the process ends, within a minute and without last words, and never with status 0."""
    os.kill(process.pid, number)
    process.wait(60) if hasattr(process, "wait") else process.join(60)
    assert (process.returncode if hasattr(process, "wait") else process.exitcode) == -number


def assert_no_last_words(folder: Path) -> None:
    assert not re.search("Traceback|SIG[A-Z]|Error", log(folder)), log(folder)


@pytest.mark.parametrize("number", [TERM, INT])
def test_while_pytorch_is_imported(unique, tmp_path, number):
    """As soon as the script has begun with its imports, which take seconds."""
    process = launch(tmp_path, f"--shards={unique}")
    maps = Path(f"/proc/{process.pid}/maps")
    while "numpy" not in (text := maps.read_text()):
        time.sleep(0.005)
    assert "libtorch" not in text
    end(process, number)
    assert log(tmp_path) == ""


@pytest.mark.parametrize("number, env", [(TERM, {}), (INT, {}), (USR1, SLURM)], ids=["TERM", "INT", "USR1 of Slurm"])
def test_while_it_trains(unique, tmp_path, begun, number, env):
    """A run that makes steps, with its loader processes. Lightning's own handlers would save or requeue."""
    flags = [f"--shards={unique}", "--max-epochs=500", f"--resume={begun}/out/version_0", "--workers=2"]
    process = launch(tmp_path, *flags, env=env)
    wait_for(tmp_path / "log-0", "Epoch 1/500, step 4/")
    end(process, number)
    assert_all_ended(tmp_path)
    assert not list(tmp_path.rglob("hpc_ckpt*"))
    assert_no_last_words(tmp_path)


def test_an_interrupt_that_the_parent_ignores_stays_ignored(unique, tmp_path):
    """As in a script's background job, which ^C at the terminal must not end; and while stderr is a full pipe."""
    os.mkfifo(tmp_path / "log-0")
    reader = os.open(tmp_path / "log-0", os.O_RDONLY | os.O_NONBLOCK)
    process = launch(tmp_path, f"--shards={unique}", "--max-epochs=500", ignored=INT)
    text = b""
    while b"Epoch 1/500, step 4/" not in text:
        time.sleep(0.05)
        text += os.read(reader, 1 << 16) if select.select([reader], [], [], 60)[0] else b""
    os.kill(process.pid, INT)
    writer = os.open(tmp_path / "log-0", os.O_WRONLY | os.O_NONBLOCK)
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    while select.select([], [writer], [], 0)[1]:  # until the run's lines fill it
        assert process.poll() is None
        time.sleep(0.05)
    end(process, TERM)
    assert_all_ended(tmp_path)


@pytest.mark.parametrize("kind, more", [("train", []), ("val", []), ("val", ["--evaluate"])])
def test_while_data_stalls(unique, tmp_path, begun, kind, more):
    """In training, in its validation and in an evaluation, while the main process waits for a batch."""
    shards = STALLING.format(shards=unique, kind=kind, folder=tmp_path)
    flags = [f"--shards={shards}", runs.SMALL[0], f"--output={begun}/out", "--resume", "--max-epochs=1", *more]
    [process] = start(tmp_path, *flags, env={"STALLS": "0"})
    wait_for(tmp_path / "stalled-0")
    before = checkpoint(begun)["global_step"]
    end(process, TERM)
    assert_no_last_words(tmp_path)
    assert checkpoint(begun)["global_step"] == before  # nothing is saved on a signal


def test_while_a_checkpoint_is_written(unique, tmp_path, monkeypatch):
    """Just before the new file gets its name: the previous one stays, and the next run overwrites the other."""
    flags = [f"--shards={unique}", "--max-epochs=1", "--checkpoint-every=1", "--resume"]
    run(tmp_path, *flags, "--max-steps=2")
    fsync = os.fsync

    def fsync_and_end(descriptor: int) -> None:
        fsync(descriptor)
        os.kill(os.getpid(), TERM)
        time.sleep(60)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync_and_end)
        run(tmp_path, *flags, expect=-TERM)
    assert_no_last_words(tmp_path)
    assert checkpoint(tmp_path)["global_step"] == 2 and len(list(tmp_path.rglob("last.ckpt.tmp"))) == 1
    run(tmp_path, *flags)
    assert checkpoint(tmp_path)["global_step"] == 11 and not list(tmp_path.rglob("*.tmp"))


def test_control_c_at_a_terminal(unique, tmp_path, monkeypatch):
    """The terminal sends it to the whole group of processes: main process, loader processes, commands."""
    words = [*runs.SMALL, f"--shards=pipe:cat {unique}/%s", f"--output={tmp_path}/out", "--workers=2"]
    monkeypatch.setenv("LAUNCHED", str(tmp_path))
    command = partial(os.execv, sys.executable, [sys.executable, runs.SCRIPT, *words])
    status, output = runs.in_terminal(80, command, "Epoch 2/90", b"\x03")
    assert status == -INT and "Traceback" not in output, output[-3000:]
    assert_all_ended(tmp_path)


# ---------------------------------------------------------------- two ranks, launchers


@pytest.mark.long
@pytest.mark.parametrize("launcher, number, stalls", [
    ("torchrun", TERM, "1"), ("torchrun", INT, ""), ("torchrun", KILL, "0"), ("lightning", TERM, "0"),
    ("lightning", KILL, "1"),
])
def test_two_ranks(unique, tmp_path, launcher, number, stalls):
    """One rank waits for a shard and the other one for that rank, in a collective; or both make steps."""
    shards = STALLING.format(shards=unique, kind="train", folder=tmp_path)
    flags = [f"--shards={shards}", "--max-epochs=500", "--checkpoint-every=1"]
    process = launch(tmp_path, *flags, launcher=launcher, env={"STALLS": stalls})
    wait_for(*(tmp_path / f"stalled-{stalls}", "") if stalls else (tmp_path / "log-0", "Epoch 3/500, step 2"))
    os.kill(process.pid, number)
    status = process.wait(60)
    assert_all_ended(tmp_path)
    assert status == -number if launcher == "lightning" or number == KILL else status
    assert not re.search("^imagenet_train.py: ", log(tmp_path), re.M)
    assert launcher == "torchrun" or "Traceback" not in log(tmp_path)  # torchrun's agent prints its own


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
    assert re.search("\nimagenet_train.py: another rank ended: its message says why .*\n$", log(tmp_path, 0))


@pytest.mark.long
@pytest.mark.parametrize("devices", [1, 2])
def test_a_local_rank_left_in_the_environment(unique, tmp_path, devices):
    """Of an image or a shell: the run is complete, also after the shell that started it has ended."""
    flags = [*runs.SMALL, f"--shards={unique}", f"--output={tmp_path}/out", "--max-steps=2", f"--devices={devices}"]
    env = os.environ | {"LOCAL_RANK": "0", "LAUNCHED": str(tmp_path)}
    with open(tmp_path / "log-0", "w") as output:
        shell = '"$@" & until grep -q " cpu × " "$LAUNCHED/log-0"; do sleep 0.1; done'
        command = ["sh", "-c", shell, "sh", sys.executable, str(runs.SCRIPT), *flags]
        subprocess.run(command, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)
    wait_for(tmp_path / "log-0", "version_0: last.ckpt")
    assert_all_ended(tmp_path)
    assert f"shufflenet_v2_x0_5 on {devices} cpu" in log(tmp_path)
    assert checkpoint(tmp_path)["global_step"] == 2


@pytest.mark.parametrize("env", [{"RANK": "1", "WORLD_SIZE": "2"}, {"RANK": "0"}, {"WORLD_SIZE": "2"}])
def test_ranks_that_no_launcher_set(unique, tmp_path, env):
    """As PyTorchJob sets them: two of rank 0 would wait for each other."""
    assert launch(tmp_path, f"--shards={unique}", env=env).wait(60) == 1
    assert re.fullmatch("imagenet_train.py: .*without LOCAL_RANK; use torchrun.*\n", log(tmp_path))
