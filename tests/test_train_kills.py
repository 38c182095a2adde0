"""Runs that are killed, at random moments and by request, and go on as if they had not been."""

import os
import random
import re
import signal
import time

import faults
import pytest
from conftest import TRAIN_IMAGES, VAL_IMAGES
from ranks import assert_same_weights, wait_for
from ranks import steps as steps_made
from training import BATCH, diary, record, start

STEPS = TRAIN_IMAGES // BATCH
KILLS = int(os.environ.get("KILLS", 8))  # at random moments


def test_killed_and_resumed_is_as_if_never_killed(unique, tmp_path, monkeypatch):
    """Of 2 epochs of 11 steps: SIGKILL within the first, between them, and within the second; no step is made twice."""
    flags = [f"--shards={unique}", "--max-epochs=2", "--checkpoint-every=1", "--resume"]
    whole = start(tmp_path / "whole", *flags)
    whole.join()
    assert whole.exitcode == 0, (tmp_path / "whole" / "log").read_text()
    folder = tmp_path / "killed"
    for step in (3, 11, 17, -1):
        monkeypatch.setenv("DIE_AT", str(step))
        process = start(folder, *flags)
        process.join()
        assert process.exitcode == (-signal.SIGKILL if step >= 0 else 0), (folder / "log").read_text()
    assert (folder / "rank-0.jsonl").read_text() == (tmp_path / "whole" / "rank-0.jsonl").read_text()
    assert_same_weights(folder, tmp_path / "whole")


def test_sigkill_at_random_moments(unique, tmp_path):
    """3 epochs; after each kill --resume; at the end the weights of a run that was never killed."""
    flags = [f"--shards=pipe:cat {unique}/", "--max-epochs=3", "--checkpoint-every=2", "--resume"]
    whole = start(tmp_path / "whole", *flags)
    whole.join()
    assert whole.exitcode == 0, (tmp_path / "whole" / "log").read_text()
    folder, rng, kills = tmp_path / "killed", random.Random(0), 0
    book = folder / "rank-0.jsonl"
    for _ in range(KILLS):
        process, size = start(folder, *flags), book.stat().st_size if book.exists() else 0
        while rng.random() < 0.99 and process.is_alive() and (not book.exists() or book.stat().st_size == size):
            time.sleep(0.01)  # mostly until it makes steps, sometimes before
        process.join(rng.uniform(0, 0.04))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), (folder / "log").read_text()[-2000:]
        kills += process.exitcode != 0
    last = start(folder, *flags)
    last.join()
    assert last.exitcode == 0 and kills >= KILLS * 0.4
    print(f"{kills} kills")
    assert steps_made(folder) == steps_made(tmp_path / "whole") and len(steps_made(folder)) == 3 * STEPS
    assert_same_weights(folder, tmp_path / "whole")


def test_killed_in_validation_it_validates_again(unique, tmp_path):
    """… also when --checkpoint-every falls on the epoch's last step."""
    flags = [f"--shards={unique}", "--max-epochs=2", f"--checkpoint-every={STEPS}", "--resume"]
    process = start(tmp_path / "out", *flags)
    wait_for(tmp_path / "out" / "rank-0.jsonl", '"val"')
    process.kill()
    process.join()
    again = start(tmp_path / "out", *flags)
    again.join()
    log = (tmp_path / "out" / "log").read_text()
    assert again.exitcode == 0, log
    validated = re.findall(r"validated 47/47 images: .* \((epoch \d, step \d+)\)", log)
    assert validated == [f"epoch 1, step {STEPS}", f"epoch 2, step {2 * STEPS}"]
    assert len(steps_made(tmp_path / "out")) == 2 * STEPS


def test_max_steps_and_then_more(unique, tmp_path):
    """Stopped by --max-steps within an epoch, and gone on with: no batch is lost or doubled."""
    for steps in ("7", "18"):
        process = start(tmp_path / "out", f"--shards={unique}", f"--max-steps={steps}", "--max-epochs=2", "--resume")
        process.join()
        assert process.exitcode == 0, (tmp_path / "out" / "log").read_text()
    process = start(tmp_path / "whole", f"--shards={unique}", "--max-steps=18", "--max-epochs=2")
    process.join()
    assert steps_made(tmp_path / "out") == steps_made(tmp_path / "whole") and len(steps_made(tmp_path / "out")) == 18


@pytest.mark.long
def test_two_ranks_outlast_a_server_that_dies(unique, tmp_path):
    """One shard can't be had for 10 s: the rank that needs it waits, the other waits for it, both finish."""
    with faults.fault_server(unique) as server:
        server.faults["imagenet-train-000002.tar"] = [faults.down(10)] * 1000
        begun = time.monotonic()
        run = record(tmp_path, f"--shards={server.url}", "--max-epochs=1", f"--output={tmp_path}/out", ranks=2)
        assert run.returncode == 0, run.stderr
        assert time.monotonic() - begun > 10
        assert "imagenet-train-000002.tar, " in run.stderr and "; retry 2 of 5" in run.stderr
    assert f"validated {VAL_IMAGES}/{VAL_IMAGES} images" in run.stdout
    labels = [label for rank in (0, 1) for batch in diary(tmp_path, rank, "train") for label in batch]
    assert len(labels) == len(set(labels)) == TRAIN_IMAGES // (2 * BATCH) * 2 * BATCH


def test_two_ranks_end_together_when_a_shard_is_gone(unique, tmp_path):
    with faults.fault_server(unique) as server:
        server.faults["imagenet-train-000002.tar"] = [faults.answer(404, "Not Found")] * 1000
        run = record(tmp_path, f"--shards={server.url}", "--max-epochs=1", f"--output={tmp_path}/out", ranks=2)
    assert run.returncode != 0
    assert re.search(r"imagenet_train.py: imagenet-train-000002\.tar, .*404", run.stderr)


def test_ranks_that_would_go_on_from_different_places_are_refused(unique, tmp_path):
    """Each machine has its own --output, and only one a checkpoint: they would train apart without a word."""
    [(tmp_path / f"machine-{rank}").mkdir() for rank in (0, 1)]
    flags = [f"--shards={unique}", "--output=out", "--resume"]
    assert record(tmp_path, *flags, "--max-epochs=1", APART="1").returncode == 0
    run = record(tmp_path, *flags, "--max-epochs=2", ranks=2, APART="1")
    assert run.returncode != 0 and "is --output a folder that all machines share?" in run.stderr


