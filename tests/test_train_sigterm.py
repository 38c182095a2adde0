"""SIGTERM: all ranks save after the same step and exit with 143, whichever got it; a resumed run loses nothing."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import VAL_IMAGES
from ranks import assert_same_weights, checkpoint, exit_codes, log, run, start, steps, wait_for
from training import HERE, SMALL

import imagenet_train as script

SIGTERM_EXIT = 128 + signal.SIGTERM
VALIDATED = f"validated {VAL_IMAGES}/{VAL_IMAGES} images"


@pytest.fixture(scope="module")
def undisturbed(unique, tmp_path_factory) -> dict[int, Path]:
    """Number of ranks → a finished run of 2 epochs."""
    folders = {ranks: tmp_path_factory.mktemp(f"undisturbed-{ranks}") for ranks in (1, 2)}
    for ranks, folder in folders.items():
        assert run(folder, f"--shards={unique}", "--max-epochs=2", ranks=ranks).count(VALIDATED) == 2
    return folders


@pytest.mark.parametrize("ranks, term_at, rank, step", [
    (1, 3, 0, 4), (1, 21, 0, 22), (2, 2, 1, 4), (2, 3, 1, 5), (2, 9, 1, 10),
])
def test_sigterm_in_a_training_step(unique, tmp_path, undisturbed, ranks, term_at, rank, step):
    """An epoch has 11 steps on 1 rank and 5 on 2. In its last step the epoch's validation is repeated, not lost."""
    flags = [f"--shards={unique}", "--max-epochs=2"]
    out = run(tmp_path, *flags, ranks=ranks, expect=SIGTERM_EXIT, TERM_AT=str(term_at), TERM_RANK=str(rank))
    assert "SIGTERM" in out and checkpoint(tmp_path)["global_step"] == step == len(steps(tmp_path))
    run(tmp_path, *flags, "--resume", ranks=ranks)
    assert log(tmp_path, 0).count(VALIDATED) == 2 and checkpoint(tmp_path, "best.ckpt")
    for each in range(ranks):
        assert steps(tmp_path, each) == steps(undisturbed[ranks], each)
    assert_same_weights(tmp_path, undisturbed[ranks])


@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_in_validation(unique, tmp_path, undisturbed, ranks):
    flags = [f"--shards={unique}", "--max-epochs=2"]
    out = run(tmp_path, *flags, ranks=ranks, expect=SIGTERM_EXIT, TERM_AT="val", TERM_RANK=str(ranks - 1))
    assert VALIDATED not in out
    run(tmp_path, *flags, "--resume", ranks=ranks)
    assert log(tmp_path, 0).count(VALIDATED) == 2
    assert_same_weights(tmp_path, undisturbed[ranks])


def test_sigterm_in_an_evaluation(unique, tmp_path, undisturbed):
    flags = [f"--shards={unique}", "--evaluate", f"--resume={next(undisturbed[1].rglob('last.ckpt'))}"]
    out = run(tmp_path, *flags, expect=SIGTERM_EXIT, TERM_AT="val")
    assert "SIGTERM" in out and VALIDATED not in out


def test_slurm_gets_no_checkpoints_of_lightnings_own(unique, tmp_path):
    """Lightning would answer SIGUSR1 with hpc_ckpt_1.ckpt and requeue the job. Here it has its default effect."""
    slurm = dict(SLURM_NTASKS="1", SLURM_JOB_NAME="train", SLURM_JOB_ID="1", SLURM_PROCID="0", SLURM_LOCALID="0",
                 SLURM_NODEID="0", SLURM_NTASKS_PER_NODE="1")
    processes = start(tmp_path, f"--shards={unique}", "--max-epochs=50", **slurm)
    wait_for(tmp_path / "rank-0.jsonl", r"\[0, 3, ")
    os.kill(processes[0].pid, signal.SIGUSR1)
    assert exit_codes(processes) == [-signal.SIGUSR1], log(tmp_path)
    assert not list(tmp_path.rglob("hpc_ckpt*"))


def test_no_further_process_group(unique, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.distributed, "new_group", lambda *args, **kwargs: pytest.fail("a second process group"))
    run(tmp_path, f"--shards={unique}", "--max-epochs=1", ranks=2, expect=SIGTERM_EXIT, TERM_AT="1", TERM_RANK="1")


# A command that stalls where it reads a training shard, in the ranks that $STALLS names, after making a file.
STALLING = """pipe:case %s:$STALLS in *train*.tar:*"$RANK"*) touch {marker}; sleep 30;; esac; cat {shards}/%s"""


@pytest.mark.parametrize("ranks, stalls, saved", [(1, "0", True), (1, "0", False), (2, "1", True), (2, "0", False)])
def test_sigterm_while_data_stalls(unique, tmp_path, monkeypatch, ranks, stalls, saved):
    """One rank waits for a shard, the other one for that rank, in a collective: neither completes a step."""
    monkeypatch.setattr(script, "SIGTERM_TIMEOUT", 1)
    flags = ["--max-epochs=1", "--resume"]
    if saved:
        run(tmp_path, f"--shards={unique}", *flags, "--max-steps=1", ranks=ranks)
    shards = STALLING.format(shards=unique, marker=tmp_path / "stalled")
    processes = start(tmp_path, f"--shards={shards}", *flags, ranks=ranks, RANK="0", STALLS=stalls)
    wait_for(tmp_path / "stalled", "")
    if ranks > 1:
        wait_for(tmp_path / f"rank-{1 - int(stalls)}.jsonl", '"train"' if not saved else r"\[0, 1, ")
        time.sleep(0.5)  # until it is in the collective
    [process.terminate() for process in processes]
    assert exit_codes(processes) == [SIGTERM_EXIT] * ranks, log(tmp_path)
    said = f"--resume continues from {tmp_path}/out/version_0/last.ckpt" if saved else "there is no checkpoint yet"
    for rank in range(ranks):
        assert f"SIGTERM: rank {rank} completed no step within 1 s; {said}\n" in log(tmp_path, rank)
    assert "Traceback" not in log(tmp_path)


# ---------------------------------------------------------------- started by Lightning: rank 0 starts the others


def start_plainly(folder: Path, *flags: str, **env: str) -> subprocess.Popen:
    """Two ranks, without torchrun, in a session of their own."""
    folder.mkdir(exist_ok=True)
    with open(folder / "log", "w") as output:
        return subprocess.Popen(
            [sys.executable, HERE / "record.py", *SMALL, f"--output={folder}/out", "--devices=2", "--max-epochs=1",
             *flags],
            env=os.environ | {"RECORD": str(folder), "WORKERS": "1"} | env,
            stdout=output, stderr=output, start_new_session=True,
        )


def left_in_session(leader: int) -> list[str]:
    """The processes of a session that have not ended."""
    left = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            state, _, _, session = (path / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(session) == leader and state != "Z":
                left.append((path / "cmdline").read_text().replace("\0", " "))
    return left


def assert_all_ended(leader: int) -> None:
    for _ in range(100):
        if not left_in_session(leader):
            return
        time.sleep(0.1)
    pytest.fail(f"still running: {left_in_session(leader)}")


@pytest.mark.long
def test_sigterm_to_rank_0_ends_the_ranks_that_it_started(unique, tmp_path):
    """Rank 0 takes longer to end than Lightning takes to notice that the other one has ended."""
    process = start_plainly(tmp_path, f"--shards={unique}", TERM_AT="1", TERM_RANK="0", LINGER="8")
    assert process.wait(100) == SIGTERM_EXIT, (tmp_path / "log").read_text()
    assert_all_ended(process.pid)
    assert checkpoint(tmp_path)["global_step"] == 3
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_when_rank_0_fails_the_ranks_that_it_started_end(unique, tmp_path):
    """Rank 1 waits for its data, so that it does not notice."""
    command = """pipe:case %s:$LOCAL_RANK in *train*.tar:1) sleep 60;; *train*.tar:*) exit 7;; esac; cat {}/%s"""
    process = start_plainly(tmp_path, f"--shards={command.format(unique)}", "--retries=0")
    assert process.wait(100) == 1
    assert "exit status 7" in (tmp_path / "log").read_text()
    assert_all_ended(process.pid)


def test_when_a_rank_fails_the_others_say_so_in_one_line(unique, tmp_path):
    command = """pipe:case %s:$RANK in *train*.tar:1) exit 7;; esac; cat {}/%s"""
    flags = [f"--shards={command.format(unique)}", "--retries=0", "--max-epochs=1"]
    run(tmp_path, *flags, ranks=2, expect=1)
    assert "exit status 7" in log(tmp_path, 1)
    assert log(tmp_path, 0).endswith("imagenet_train.py: another rank ended; its message says why\n")
    assert "Traceback" not in log(tmp_path)
