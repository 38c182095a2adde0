"""Whole runs: who gets which samples on ranks and workers, what is validated, logged, shown and left in the folder."""

import itertools
import json
import math
import re
import tarfile
from pathlib import Path

import pytest
import pytorch_lightning as pl
import runs
import torch
import torchvision
from conftest import TRAIN_IMAGES, VAL_IMAGES, convert
from faults import answer, fault_server, reset
from runs import BATCH, TINY, batches, checkpoint, exit_codes, log, rows, run, start, train

import imagenet_train as script

VALIDATED = f"validated {VAL_IMAGES}/{VAL_IMAGES} images"
FILES = {"last.ckpt", "best.ckpt", "metrics.csv", "metrics.json", "model.pt"}


# ---------------------------------------------------------------- who gets what


def labels_in_order(shards: Path) -> list[int]:
    """The label of every training sample, by its number."""
    found = []
    for name in sorted(shards.glob("imagenet-train-*.tar")):
        with tarfile.open(name) as tar:
            found += [int(tar.extractfile(m).read()) for m in tar if m.name.endswith(".cls")]
    return found


@pytest.mark.parametrize("ranks, workers", [(1, 0), (1, 2), (2, 3), (3, 2)])
def test_ranks_and_workers_get_exactly_the_planned_samples(unique, tmp_path, ranks, workers):
    """On any number of ranks and workers; and between two entries of the log no step waits for the device.

    Reading a number off a tensor waits for it; only rank 0 prints.
    """
    flags = [f"--shards={unique}", "--max-epochs=2", "--log-every=3"]
    out = run(tmp_path, *flags, ranks=ranks, workers=workers, reads=True)
    assert out.count(VALIDATED) == 2 and log(tmp_path).count(VALIDATED) == 2
    steps, labels = TRAIN_IMAGES // (ranks * BATCH), [*labels_in_order(unique), -1]
    index, division = script.read_index(str(unique), "train"), script.Division(True, ranks, max(1, workers), BATCH, 5)
    for epoch in (0, 1):
        plan, _ = script.plan_epoch(index, True, 0, epoch, [division])
        assert plan.shape == (ranks, steps, BATCH)
        for rank in range(ranks):
            expected = [[labels[number] for number in batch] for batch in plan[rank].tolist()]
            assert batches(tmp_path, rank, "train", epoch) == expected
        seen = [batches(tmp_path, rank, "val", epoch) for rank in range(ranks)]
        assert len({len(each) for each in seen}) == 1  # equal numbers: no rank waits for another
        found = [label for label in itertools.chain(*itertools.chain(*seen)) if label != script.IGNORE_INDEX]
        assert sorted(found) == list(range(VAL_IMAGES))
    for rank in range(ranks):
        lines = [line for line in runs.diary(tmp_path, rank) if line[2] == "train" and line[0] == 0]
        read = [step for (*_, before), (_, step, *_, after) in itertools.pairwise(lines) if after > before]
        assert read == list(range(3, steps, 3))


def test_ranks_that_differ_are_refused_before_the_first_step(unique, tmp_path):
    """In a flag, in what the order depends on, or in where they would continue: the error names it and both values."""
    assert convert(unique.parent / "tree", tmp_path / "other", "--maxcount=9", "--block-size=5") == 0
    run(tmp_path / "one", f"--shards={unique}", "--max-steps=2")
    [last] = (tmp_path / "one").rglob("last.ckpt")
    evaluate = ["--evaluate", f"--weights={last}"]
    for flags, own, said in (
        ([], ["--lr=0.1"], "--lr is 0.256 on rank 0, 0.1 on rank 1"),
        ([], ["--train-size=48"], "--train-size is 32 on rank 0, 48 on rank 1"),
        ([], ["--weight-decay=0"], "--weight-decay is 3.05.*e-05 on rank 0, 0.0 on rank 1"),
        ([], ["--max-steps=3"], "--max-steps is -1 on rank 0, 3 on rank 1"),
        ([], ["--checkpoint-every=2"], "--checkpoint-every is 1000 on rank 0, 2 on rank 1"),
        ([], ["--model=squeezenet1_1"], "--model is tiny on rank 0, squeezenet1_1 on rank 1"),
        ([], ["--seed=1"], "--seed is 0 on rank 0, 1 on rank 1"),
        ([], [f"--shards={tmp_path}/other"], "index of train is [0-9a-f]+ on rank 0, [0-9a-f]+ on rank 1"),
        (evaluate, [f"--shards={tmp_path}/other"], "index of val is [0-9a-f]+ on rank 0, [0-9a-f]+ on rank 1"),
        ([], ["--workers=2"], "--workers is 1 on rank 0, 2 on rank 1"),
        (evaluate, ["--batch-size=2"], "--batch-size is 4 on rank 0, 2 on rank 1"),
        ([f"--output={tmp_path}/one/out", "--resume"], [f"--output={tmp_path}/none"], "step is 2 on rank 0, 0 on rank"),
    ):
        folder = tmp_path / re.sub("[^a-z]", "", f"{flags[:1]}{own}")
        assert exit_codes(start(folder, f"--shards={unique}", *flags, ranks=2, each=lambda r, own=own: own * r)) == [
            1, 1], log(folder)
        assert re.search(f"^imagenet_train.py: ranks differ: .*{said}", log(folder), re.MULTILINE), log(folder)
        assert not (folder / "rank-0.jsonl").exists() and "Traceback" not in log(folder)


# ---------------------------------------------------------------- launchers and sources


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["torchrun", "lightning"])
def test_two_ranks_are_one_run(unique, tmp_path, launcher):
    """README's torchrun line, without --devices, and Lightning's own launcher: one folder, one log, equal steps."""
    (tmp_path / "out" / "version_4").mkdir(parents=True)
    process = runs.launch(tmp_path, f"--shards={unique}", "--max-epochs=1", launcher=launcher)
    assert process.wait(200) == 0, log(tmp_path)
    assert "shufflenet_v2_x0_5 on 2 cpu × 1 worker, 32-true: 47 train images in 6 shards" in log(tmp_path)
    assert len(re.findall(rf"{VALIDATED}.* \(epoch 1, step 5\)", log(tmp_path))) == log(tmp_path).count(" cpu × ") == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["version_4", "version_5"]
    assert {path.name for path in (tmp_path / "out" / "version_5").iterdir()} >= FILES
    assert [row["epoch"] for row in rows(tmp_path) if row["val_top1"]] == ["1.0"]


def test_two_ranks_outlast_a_server_that_fails_and_end_when_a_shard_is_missing(unique, tmp_path):
    """One rank waits for the shard, the other one for that rank."""
    with fault_server(unique) as server:
        server.faults["imagenet-train-000002.tar"] = [reset(lambda data: 0)] * 3
        out = run(tmp_path / "down", f"--shards={server.url}", "--max-epochs=1", ranks=2)
        server.faults["imagenet-train-000002.tar"] = [answer(404, "Not Found")] * 1000
        run(tmp_path / "missing", f"--shards={server.url}", "--max-epochs=1", ranks=2, expect=1)
    assert VALIDATED in out and re.search("imagenet-train-000002.tar.*; next try in ", log(tmp_path / "down"))
    labels = [label for rank in (0, 1) for batch in batches(tmp_path / "down", rank, "train", 0) for label in batch]
    assert len(labels) == len(set(labels)) == TRAIN_IMAGES // (2 * BATCH) * 2 * BATCH
    assert re.search(r"imagenet_train.py: .*imagenet-train-000002\.tar: no such file", log(tmp_path / "missing"))
    assert "Traceback" not in log(tmp_path)


@pytest.mark.quick
def test_one_epoch(shards, tmp_path, capsys):
    """What is printed, and what is in the folder."""
    assert train(f"pipe:cat {shards}/", tmp_path) == 0
    out = capsys.readouterr().out
    assert ("tiny on 1 cpu × 0 workers, 32-true: 60 train images in 9 shards, 30 val in 5, 10 classes; 15 batches of "
            "4 × 1 an epoch; from pipe:cat") in out
    assert re.search(r"validated 30/30 images: top-1 [\d.]+ %, top-5 [\d.]+ %, loss [\d.]+ \(epoch 1, step 15\)", out)
    assert {path.name for path in (tmp_path / "version_0").iterdir()} >= FILES
    names = {"train_loss", "train_images/s", "train_wait", "val_top1", "val_top5", "val_loss", "lr"}
    assert rows(tmp_path)[0].keys() >= names and len(rows(tmp_path)) >= 7


def test_shards_of_the_last_version(tmp_path, capsys):
    """Trained from and evaluated, as that version wrote them."""
    with tarfile.open(Path(__file__).parent / "data" / "shards-v2.tar") as tar:
        tar.extractall(tmp_path, filter="data")
    assert train(tmp_path / "shards", tmp_path / "out") == 0
    [trained] = re.findall("validated .* loss [0-9.]+", capsys.readouterr().out)
    assert train(tmp_path / "shards", tmp_path / "out", "--evaluate", "--resume") == 0
    assert trained in capsys.readouterr().out


# ---------------------------------------------------------------- validation


def test_validation_that_misses_an_image_is_an_error(shards, tmp_path, capsys, monkeypatch):
    length = script.Loader.__len__
    monkeypatch.setattr(script.Loader, "__len__", lambda self: length(self) - (not self.config.training))
    assert train(shards, tmp_path) == 1
    assert "validation saw 28 images, the index lists 30" in runs.one_line(capsys)


def test_two_ranks_validate_the_model_that_is_saved(unique, tmp_path, monkeypatch):
    """Its weights and rank 0's batch-norm statistics: both ranks have them, and the printed loss is theirs."""

    def note(self, trainer: pl.Trainer, module: script.Classifier, *args) -> None:
        with open(tmp_path / f"buffers-{trainer.global_rank}", "a") as file:
            print(*(float(buffer.sum()) for buffer in module.model.buffers()), file=file)

    monkeypatch.setattr(script.Results, "on_validation_batch_start", note)
    out = run(tmp_path, f"--shards={unique}", "--max-epochs=1", "--lr=0.01", ranks=2)
    first, second = ((tmp_path / f"buffers-{rank}").read_text() for rank in (0, 1))
    assert first == second and first.count("\n") == 6
    last = checkpoint(tmp_path)
    model = script.Classifier(classes=last["classes"], **last["hyper_parameters"]).eval()
    model.load_state_dict(last["state_dict"])
    index = script.read_index(str(unique), "val")
    for batch in script.Loader(script.LoaderConfig(index, False, BATCH, 32, 36)):
        with torch.no_grad():
            model.validation_step(batch, 0)
    [printed] = re.findall(r"loss ([\d.]+) \(epoch 1, step 5\)", out)
    assert float(printed) == pytest.approx(float(model.sums[3]) / VAL_IMAGES, rel=1e-4)


def test_the_best_epoch_is_exported(shards, tmp_path):
    """As a plain state dict for torchvision, with what its validation gave."""
    assert train(shards, tmp_path, "--max-epochs=3", "--lr=0.01") == 0
    version = tmp_path / "version_0"
    metrics = json.loads((version / "metrics.json").read_text())
    best = max((row for row in rows(version) if row["val_top1"]), key=lambda row: float(row["val_top1"]))
    assert metrics["epoch"] == float(best["epoch"]) and metrics["step"] == 15 * metrics["epoch"]
    assert {name: metrics[name] for name in ("val_top1", "val_top5", "val_loss")} == pytest.approx(
        {name: float(best[name]) for name in ("val_top1", "val_top5", "val_loss")})
    assert (metrics["model"], metrics["val_size"], metrics["val_resize"]) == ("tiny", 32, 36)
    model = torchvision.models.get_model("tiny", num_classes=10)
    model.load_state_dict(torch.load(version / "model.pt", weights_only=True))
    kept = checkpoint(version, "best.ckpt")["state_dict"]
    assert all(torch.equal(value, kept[f"model.{key}"]) for key, value in model.state_dict().items())


# ---------------------------------------------------------------- log and progress


@pytest.mark.parametrize("ranks, source", [(1, "train"), (2, "train"), (1, "val"), (2, "val")])
def test_a_loss_that_is_not_finite_ends_the_run(unique, tmp_path, ranks, source):
    """At the next entry of the log, or after a validation; nothing is exported."""
    flags = [f"--shards={unique}", "--max-epochs=3", "--lr=1e30", "--warmup-epochs=0"]
    flags += ["--log-every=3"] if source == "train" else ["--log-every=1000"]
    run(tmp_path, *flags, ranks=ranks, expect=1)
    name, step = ("training", 3) if source == "train" else ("validation", 12 // ranks - 1)
    said = rf"imagenet_train.py: the {name} loss is (nan|inf) at step {step}; use a lower --lr, .* and resume from an "
    assert re.search(said, log(tmp_path)) and "Traceback" not in log(tmp_path)
    assert not list(tmp_path.rglob("model.pt"))


def test_undecodable_images_are_named(unique, tmp_path, monkeypatch):
    """By the rank that left them out. More than --max-bad on a rank end the run."""
    decode = script.decode
    monkeypatch.setattr(script, "decode", lambda sample, config, epoch: (
        (None, "image: damaged") if config.training and int(sample["cls"]) % 8 == 0 else decode(sample, config, epoch)))
    run(tmp_path, f"--shards={unique}", "--max-epochs=1", ranks=2)
    assert min(log(tmp_path, rank).count("imagenet_train.py: not used: image: damaged") for rank in (0, 1)) > 0
    out = run(tmp_path / "few", f"--shards={unique}", "--max-epochs=1", "--max-bad=1", expect=1)
    assert "imagenet_train.py: 2 undecodable images in an epoch, --max-bad=1; last: image: damaged" in out


@pytest.mark.parametrize("package", ["raise TypeError('Descriptors')", ""])
def test_a_broken_tensorboard_is_a_warning(unique, tmp_path, package):
    """In a folder on PYTHONPATH: one whose import fails, one of a version that PyTorch refuses."""
    (tmp_path / "broken" / "tensorboard").mkdir(parents=True)
    (tmp_path / "broken" / "tensorboard" / "__init__.py").write_text(package)
    process = runs.launch(tmp_path, f"--shards={unique}", "--max-steps=2", env={"PYTHONPATH": f"{tmp_path}/broken"})
    assert process.wait(200) == 0 and "Traceback" not in log(tmp_path), log(tmp_path)
    assert re.search("^imagenet_train.py: no log for TensorBoard: ", log(tmp_path), re.M)
    assert checkpoint(tmp_path)["global_step"] == 2


def test_without_a_terminal_there_are_plain_lines(unique, tmp_path):
    """From rank 0 alone, and nothing of Lightning's own, which has hints and warnings of what is meant so here."""
    out = run(tmp_path, f"--shards={unique}", "--max-epochs=2", "--log-every=4", ranks=2)
    line = r"^Epoch (\d)/2, step (\d)/5: loss \d+\.\d{3}, img/s [\d,]+, wait \d+%$"
    assert re.findall(line, out, re.MULTILINE) == [("1", "4"), ("2", "3")]
    assert out.count("\n") == 6 and "\r" not in out and "\x1b" not in out, out
    assert log(tmp_path, 1) == ""
    assert [float(row["epoch"]) for row in rows(tmp_path)] == pytest.approx([32 / 47, 1, 1 + 24 / 47, 2])


def screen(drawn: str) -> list[str]:
    """The lines that are left on a terminal after carriage returns and movements of the cursor upwards."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[A|[\r\n]|[^\r\n\x1b]+", drawn):
        if part in ("\r", "\n", "\x1b[A"):
            row, column = row + {"\n": 1, "\x1b[A": -1}.get(part, 0), 0 if part != "\x1b[A" else column
            lines += [""] * (row == len(lines))
        else:
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in lines if line.strip()]


def test_the_bar_in_a_terminal(unique, tmp_path, monkeypatch):
    """80 columns show all figures, also of an epoch that is resumed. Messages stand on lines of their own.

    One of an image that is left out, and the one of the error that ends the run, below the bars.
    """
    decode, flags = script.decode, [*TINY, f"--shards={unique}", f"--output={tmp_path}", "--max-epochs=2", "--resume"]
    assert script.main([*flags, "--workers=0", "--max-steps=3"]) == 0
    monkeypatch.setattr(script, "decode", lambda sample, config, epoch: (
        (None, "image: damaged") if config.training and int(sample["cls"]) == 7 else decode(sample, config, epoch)))
    finite = script.check_finite

    def fail_in_epoch_2(loss: float, name: str, step: int) -> None:
        finite(math.nan if step == 22 and name.startswith("val") else loss, name, step)

    monkeypatch.setattr(script, "check_finite", fail_in_epoch_2)
    status, drawn = runs.in_terminal(80, lambda: script.main([*flags, "--workers=1"]))
    bars = [bar for bar in re.split(r"[\r\n]", drawn) if re.match(r"Epoch \d/\d", bar) and "loss" in bar]
    full = r"Epoch [12]/2: .{4,}\| \d+/11, (\d\d:\d\d|\?) left, loss=\d+\.\d+, img/s=[\d,]+, wait=\d+%"
    assert bars and all(re.fullmatch(full, bar) for bar in bars) and all(len(bar) <= 80 for bar in bars)
    assert [bar for bar in bars if bar.startswith("Epoch 1/2") and "| 11/11" in bar], bars
    assert re.search(r"Validation.*\| 12/12", drawn)
    top, resumed, *lines = screen(drawn)
    assert "imagenet_train.py: not used: image: damaged" in lines and status == 1
    assert [line for line in lines if line.startswith("Epoch")] == [lines[-2]] and "| 11/11" in lines[-2]
    assert lines[-1].startswith("imagenet_train.py: the validation loss is nan at step 22; ")
    assert len([line for line in lines if line.startswith(VALIDATED)]) == 2
