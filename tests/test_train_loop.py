"""The training loop: learning rate, loss, validation, log and progress."""

import csv
import fcntl
import math
import os
import pty
import re
import struct
import sys
import termios
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from conftest import TRAIN_IMAGES, VAL_IMAGES, forked
from ranks import assert_same_weights, checkpoint, log, run
from training import BATCH, TINY, record

import imagenet_train as script

# ---------------------------------------------------------------- learning rate


def test_the_learning_rate_of_four_epochs_of_five_steps():
    """Warm-up of one epoch, evaluated at each step's end; then a cosine, evaluated at its start."""
    factors = [script.lr_factor((step / 5, (step + 1) / 5), warmup=1, epochs=4) for step in range(20)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1])
    assert factors[5:] == pytest.approx([(1 + math.cos(math.pi * step / 15)) / 2 for step in range(15)])
    assert factors[5] == 1 and 0 < factors[-1] < 0.02 and factors[5:] == sorted(factors[5:], reverse=True)


@pytest.mark.parametrize("epochs, warmup", [(1, 0), (1, 0.5), (90, 8), (2, 1)])
def test_no_step_has_the_rate_0_or_more_than_the_peak(epochs, warmup):
    for steps in (1, 3, 10):
        factors = [script.lr_factor((n / steps, (n + 1) / steps), warmup, epochs) for n in range(epochs * steps)]
        assert all(0 < factor <= 1 for factor in factors) and max(factors) > 0.9 * (steps > 1 or warmup != 0.5)
    assert script.lr_factor((0, 0), warmup=0, epochs=1) == 1


class Rates(pl.Callback):
    """Position of the sample after each step → what the optimiser used in that step."""

    def __init__(self) -> None:
        self.used: dict[tuple[int, int], list[tuple[float, float, float]]] = {}

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer) -> None:
        images = round(trainer.datamodule.loader.position[1] * TRAIN_IMAGES)
        groups = [(group["lr"], group["momentum"], group["weight_decay"]) for group in optimizer.param_groups]
        self.used[images, trainer.global_step] = groups


@pytest.fixture
def rates(monkeypatch):
    """Runs the script in this process with these flags; returns {(images used, step): settings of the groups}."""
    make = script.make_trainer

    def train(folder: Path, *flags: str) -> dict[tuple[int, int], list[tuple[float, float, float]]]:
        recorder = Rates()

        def with_recorder(*args, **changes) -> pl.Trainer:
            trainer = make(*args, **changes)
            trainer.callbacks.append(recorder)
            return trainer

        monkeypatch.setattr(script, "make_trainer", with_recorder)
        assert script.main([f"--output={folder}", "--workers=0", *TINY, *flags]) == 0
        return recorder.used

    return train


def test_the_optimiser_gets_the_recipe(unique, tmp_path, rates):
    """Peak × global batch / 256; no weight decay on norms and biases."""
    recipe = ["--lr=0.512", "--warmup-epochs=0", "--weight-decay=0.01", "--momentum=0.5"]
    used = rates(tmp_path, f"--shards={unique}", "--max-epochs=1", *recipe)
    assert list(used) == [(BATCH * (step + 1), step) for step in range(11)]
    for (images, _), (decay, no_decay) in used.items():
        rate = 0.512 * BATCH / 256 * (1 + math.cos(math.pi * (images - BATCH) / TRAIN_IMAGES)) / 2
        assert decay == (pytest.approx(rate), 0.5, 0.01) and no_decay == (pytest.approx(rate), 0.5, 0)
    model = script.Classifier("shufflenet_v2_x0_5", 47, 0.1, 0.9, 1e-4, 0.1, 1, VAL_IMAGES)
    decay, no_decay = model.configure_optimizers().param_groups
    assert {p.ndim for p in decay["params"]} == {2, 4} and {p.ndim for p in no_decay["params"]} == {1}
    assert len(decay["params"]) + len(no_decay["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("steps", [4, 11])
def test_after_a_resume_the_flags_decide(unique, tmp_path, rates, steps):
    """In an epoch or at its end, with other flags: at the same positions, all is as in a run that always had them."""
    flags = [f"--shards={unique}", "--warmup-epochs=1"]
    new = ["--max-epochs=3", f"--batch-size={2 * BATCH}", "--lr=0.1", "--momentum=0.5", "--weight-decay=0.01"]
    rates(tmp_path / "out", *flags, "--max-epochs=1", f"--max-steps={steps}")
    resumed = rates(tmp_path / "out", *flags, *new, "--resume")
    whole = rates(tmp_path / "whole", *flags, *new)
    resumed, whole = ({images: groups for (images, _), groups in used.items()} for used in (resumed, whole))
    assert len(whole) == 3 * 5 and list(resumed) == list(whole)[2 if steps == 4 else 5 :]
    assert all(groups == whole[images] and groups[0][0] > 0 for images, groups in resumed.items())


def test_an_equal_global_batch_gives_equal_rates(unique, tmp_path, rates):
    """One rank, and from the third step on two with half of the batch each: the rate is the same at every position."""
    flags = [f"--shards={unique}", "--max-epochs=2", "--warmup-epochs=1", "--log-every=1"]
    used = rates(tmp_path / "whole", *flags, f"--batch-size={2 * BATCH}")
    rates(tmp_path / "two" / "out", *flags, f"--batch-size={2 * BATCH}", "--max-steps=2")
    run(tmp_path / "two", *flags, "--resume", ranks=2)
    logged = [(float(row["epoch"]), float(row["lr"])) for row in rows(tmp_path / "two") if row["lr"]]
    assert len(logged) == 10
    assert logged == [pytest.approx((images / TRAIN_IMAGES, groups[0][0])) for (images, _), groups in used.items()]


def rows(folder: Path) -> list[dict[str, str]]:
    (path,) = folder.rglob("metrics.csv")
    with open(path) as file:
        return list(csv.DictReader(file))


def test_the_log_has_the_rate_that_the_step_used(unique, tmp_path, rates):
    used = rates(tmp_path, f"--shards={unique}", "--max-epochs=2", "--log-every=3")
    logged = {int(row["step"]): float(row["lr"]) for row in rows(tmp_path) if row["lr"]}
    assert list(logged) == list(range(2, 22, 3))
    assert logged == pytest.approx({step: groups[0][0] for (_, step), groups in used.items() if step % 3 == 2})


# ---------------------------------------------------------------- loss and validation


class FirstBatch:
    """A loader that has handed out the first of five batches."""

    done = 1

    def __len__(self) -> int:
        return 5


def step(model: script.Classifier, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    loss = model.training_step([images, labels], 0)
    loss.backward()
    return loss


def test_rows_without_a_label_do_not_count_in_the_loss():
    """The sum over the others, divided by all; 0 if there are no others."""
    torch.manual_seed(0)
    model = script.Classifier("resnet18", 10, 0.1, 0.9, 1e-4, 0.1, 1, 10).eval()  # eval: no row changes another one's
    data = types.SimpleNamespace(loader=FirstBatch())
    model._trainer = types.SimpleNamespace(datamodule=data, global_step=0, global_rank=0)
    images, labels = torch.randint(0, 256, (6, 32, 32, 3), dtype=torch.uint8), torch.tensor([3, -1, 0, -1, -1, 9])
    loss = step(model, images, labels)
    counted = F.cross_entropy(model(images), labels, label_smoothing=0.1, ignore_index=-1, reduction="none")
    assert counted[labels < 0].tolist() == [0, 0, 0]
    torch.testing.assert_close(loss, counted.sum() / 6)
    assert step(model, images, torch.full((6,), -1)) == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_two_ranks_validate_the_model_that_is_saved(unique, tmp_path, monkeypatch):
    """Its weights and rank 0's batch-norm statistics: both ranks have them, and the printed loss is theirs."""

    def note(self, trainer: pl.Trainer, module: script.Classifier, *args) -> None:
        with open(tmp_path / f"buffers-{trainer.global_rank}", "a") as file:
            print(*(float(buffer.sum()) for buffer in module.model.buffers()), file=file)

    monkeypatch.setattr(script.ProgressBar, "on_validation_batch_start", note)
    out = run(tmp_path, f"--shards={unique}", "--max-epochs=1", "--lr=0.01", ranks=2)
    first, second = ((tmp_path / f"buffers-{rank}").read_text() for rank in (0, 1))
    assert first == second and first.count("\n") == 6
    last = checkpoint(tmp_path)
    model = script.Classifier(**last["hyper_parameters"]).eval()
    model.load_state_dict(last["state_dict"])
    index = script.read_index(str(unique), "val")
    for batch in script.Loader(script.LoaderConfig(index, False, BATCH, 32, 36)):
        with torch.no_grad():
            model.validation_step(batch, 0)
    (printed,) = re.findall(r"loss ([\d.]+) \(epoch 1, step 5\)", out)
    assert float(printed) == pytest.approx(float(model.loss.compute()), rel=1e-4)


def test_a_resumed_run_draws_the_same_dropout(unique, tmp_path):
    """In the middle of an epoch, of a model with dropout and without batch norm."""
    flags = [f"--shards={unique}", "--model=squeezenet1_1", "--max-epochs=1", "--resume", "--checkpoint-every=3"]
    train = [f"--output={tmp_path / 'whole'}", "--workers=0", *TINY, *flags]
    assert script.main(train) == 0
    train[0] = f"--output={tmp_path / 'parts'}"
    for steps in ("--max-steps=4", "--max-steps=7", "--max-steps=-1"):
        assert script.main([*train, steps]) == 0
        torch.rand(100)  # the state of the generator does not matter
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")


def test_undecodable_images_of_all_ranks_are_counted(unique, tmp_path, monkeypatch):
    """The message gives the sum over two ranks, each of which names its own."""
    real = script.decode

    def decode(sample: dict, config: script.LoaderConfig, epoch: int) -> tuple[torch.Tensor, int]:
        if config.training and int(sample["cls"]) % 8 == 0:
            raise script.TrainError(f"{sample['__key__']}: damaged")
        return real(sample, config, epoch)

    monkeypatch.setattr(script, "decode", decode)
    out = run(tmp_path, f"--shards={unique}", "--max-epochs=1", ranks=2)
    named = [log(tmp_path, rank).count("damaged") for rank in (0, 1)]
    assert f"epoch 1: {sum(named)} images could not be decoded and were left out\n" in out and min(named) > 0


# ---------------------------------------------------------------- log and progress


def test_images_per_second_are_those_of_training_alone(unique, tmp_path, monkeypatch, rates):
    """By a clock that advances 1 s a training step and 1000 s a validation batch."""
    seconds = [0.0]
    monkeypatch.setattr(script.time, "perf_counter", lambda: seconds[0])
    for name, each in (("training_step", 1.0), ("validation_step", 1000.0)):
        real = getattr(script.Classifier, name)

        def timed(self, *args, real=real, each=each) -> torch.Tensor | None:
            seconds[0] += each
            return real(self, *args)

        monkeypatch.setattr(script.Classifier, name, timed)
    rates(tmp_path, f"--shards={unique}", "--max-epochs=3", "--log-every=2")
    speeds = [float(row["train_images/s"]) for row in rows(tmp_path) if row["train_images/s"]]
    assert speeds == [BATCH] * (33 // 2)


def test_the_log_has_the_position_in_epochs(unique, tmp_path, rates):
    rates(tmp_path, f"--shards={unique}", "--max-epochs=2", "--log-every=11")
    logged = [float(row["epoch"]) for row in rows(tmp_path)]  # one row of training and one of validation an epoch
    assert logged == pytest.approx([44 / 47, 1, 1 + 44 / 47, 2])


def in_terminal(columns: int, *args: str) -> str:
    """Run the script in a terminal of so many columns. Returns all that was written to it."""
    pid, terminal = pty.fork()
    if pid == 0:
        sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)  # not pytest's
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        forked()
        os._exit(script.main([*TINY, "--workers=0", *args]))
    data = b""
    try:
        while part := os.read(terminal, 1 << 16):
            data += part
    except OSError:  # how Linux reports that the other side was closed
        pass
    os.waitpid(pid, 0)
    return data.decode().replace("\r\n", "\n")


@pytest.mark.parametrize("columns", [80, 120])
def test_the_bar_in_a_terminal(unique, tmp_path, columns):
    drawn = in_terminal(columns, f"--shards={unique}", f"--output={tmp_path}", "--max-epochs=2", "--log-every=2")
    bars = [state for state in re.split(r"[\r\n]", drawn) if "|" in state]
    assert bars and all(len(bar) < columns for bar in bars)
    assert {bar[: len("Epoch 1/2 |")] for bar in bars} == {"Epoch 1/2 |", "Epoch 2/2 |", "Validation "}
    full = r"(Epoch \d/\d|Validation) \|(.{8,})\| \d+/\d+, (\d\d:\d\d|\?) left, loss \d+\.\d+, [\d,]+ img/s, wait \d+%"
    assert all(re.fullmatch(full, bar) for bar in bars if bar.startswith("Epoch 2")), bars  # from its first state on
    lines = [line.rpartition("\r")[2] for line in drawn.split("\n")]  # what is left on the screen
    assert sum(line.startswith(f"validated {VAL_IMAGES}/{VAL_IMAGES}") for line in lines) == 2
    assert not any("|" in line for line in lines)


def test_messages_in_a_terminal_stand_on_lines_of_their_own(unique, tmp_path, monkeypatch):
    """An image that is left out, then an error that ends the run."""
    decode, batches = script.decode, script.Loader.__iter__

    def decode_one_less(sample: dict, config: script.LoaderConfig, epoch: int) -> tuple[torch.Tensor, int]:
        if sample["cls"] == b"7" and config.training:
            raise script.TrainError("image: damaged")
        return decode(sample, config, epoch)

    def fail_in_epoch_2(self) -> Iterator[list[torch.Tensor]]:
        for batch in batches(self):
            if self.config.training and self.epoch == 1 and self.done == 3:
                raise script.TrainError("shard: broken")
            yield batch

    monkeypatch.setattr(script, "decode", decode_one_less)
    monkeypatch.setattr(script.Loader, "__iter__", fail_in_epoch_2)
    drawn = in_terminal(80, f"--shards={unique}", f"--output={tmp_path}", "--max-epochs=2", "--log-every=2")
    lines = [line.rpartition("\r")[2] for line in drawn.rstrip("\n").split("\n")]
    assert lines[-1] == "imagenet_train.py: shard: broken" and "Epoch 2/2" in drawn
    assert "imagenet_train.py: not used: image: damaged" in lines
    assert not any("|" in line for line in lines)


def test_without_a_terminal_there_are_plain_lines(unique, tmp_path):
    """From rank 0 alone, and nothing of Lightning's own: it has hints, and warnings of what is meant so here."""
    flags = [f"--shards={unique}", f"--output={tmp_path}/out", "--max-epochs=2", "--log-every=4"]
    done = record(tmp_path, *flags, ranks=2, workers="1")
    assert done.returncode == 0 and "\r" not in done.stdout and "\x1b" not in done.stdout
    line = r"^Epoch (\d)/2, step (\d)/5: loss \d+\.\d{3}, [\d,]+ img/s, wait \d+%$"
    assert re.findall(line, done.stdout, re.MULTILINE) == [("1", "4"), ("2", "3")] and done.stdout.count("Epoch") == 2
    assert not re.search("lightning|Warning|GLOBAL_RANK", done.stderr), done.stderr
