"""imagenet_train.py as its users run it: real ranks, real kills, real checkpoints."""

import itertools
import re
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from conftest import TRAIN_IMAGES, VAL_IMAGES
from training import BATCH, diary, record, train

import imagenet_train as script


def labels_in_order(shards: Path) -> list[int]:
    """The label of every training sample, by its number."""
    found = []
    for name in sorted(shards.glob("imagenet-train-*.tar")):
        with tarfile.open(name) as tar:
            found += [int(tar.extractfile(m).read()) for m in tar if m.name.endswith(".cls")]
    return found


# ---------------------------------------------------------------- who gets what


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_and_workers_get_exactly_the_planned_samples(unique, tmp_path, ranks):
    flags = [f"--shards={unique}", "--max-epochs=2", f"--output={tmp_path}/out"]
    run = record(tmp_path, *flags, ranks=ranks, workers="0 2 3")
    assert run.returncode == 0, run.stderr
    assert run.stdout.count(f"validated {VAL_IMAGES}/{VAL_IMAGES} images") == 3 * 2  # by rank 0 only
    steps = TRAIN_IMAGES // (ranks * BATCH)
    index, labels = script.read_index(str(unique), "train"), labels_in_order(unique)
    for workers, epoch, rank in itertools.product((0, 2, 3), (0, 1), range(ranks)):
        folder = tmp_path / f"workers-{workers}"
        division = script.Division(True, ranks, max(1, workers), BATCH, 5)
        orders = [script.plan_reader(index, True, 0, epoch, [division], rank, w)[0] for w in range(division.workers)]
        left = [iter([labels[number] for number in order]) for order in orders]
        expected = [list(itertools.islice(left[n % division.workers], BATCH)) for n in range(steps)]
        assert diary(folder, rank, "train", epoch) == expected
    for workers, epoch in itertools.product((0, 2, 3), (0, 1)):
        seen = [diary(tmp_path / f"workers-{workers}", rank, "val", epoch) for rank in range(ranks)]
        assert len({len(batches) for batches in seen}) == 1  # equal numbers: no rank waits for another
        found = [label for batches in seen for batch in batches for label in batch]
        assert sorted(label for label in found if label != script.IGNORE_INDEX) == list(range(VAL_IMAGES))


# ---------------------------------------------------------------- the command line, in this process


@pytest.mark.quick
def test_one_epoch(shards, tmp_path, capsys):
    assert train(f"pipe:cat {shards}/", tmp_path / "out", "--max-steps=4") == 0
    out = capsys.readouterr().out
    assert re.search(
        r"tiny on 1 cpu × 0 workers, 32-true: 60 train images in 9 shards, 30 val in 5, 10 classes; "
        rf"15 batches of 4 × 1 an epoch; from pipe:cat {shards}/", out)
    assert {"last.ckpt", "metrics.csv"} <= {path.name for path in (tmp_path / "out" / "version_0").iterdir()}


def test_an_epoch_with_validation(shards, tmp_path, capsys):
    assert train(shards, tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert re.search(r"validated 30/30 images: top-1 [\d.]+ %, top-5 [\d.]+ %, loss [\d.]+ \(epoch 1, step 15\)", out)
    assert (tmp_path / "out" / "version_0" / "best.ckpt").exists()
    header, *lines = (tmp_path / "out" / "version_0" / "metrics.csv").read_text().splitlines()
    names = {"train_loss", "train_images/s", "train_wait", "val_top1", "val_top5", "val_loss", "lr"}
    assert names <= set(header.split(","))
    assert len(lines) >= 7


def test_validation_that_misses_an_image_is_an_error(shards, tmp_path, capsys, monkeypatch):
    real = script.LoaderConfig.steps.fget
    monkeypatch.setattr(script.Loader, "__len__", lambda self: real(self.config) - (not self.config.training))
    assert train(shards, tmp_path / "out") == 1
    assert "validation saw 28 images, the index lists 30" in capsys.readouterr().err


def test_metrics_are_those_of_plain_arithmetic(unique, tmp_path):
    """Of a fixed model on 1 rank: top-1, top-5 and loss over real images only, the padding left out."""
    index = script.read_index(str(unique), "val")
    torch.manual_seed(0)
    model = script.Classifier("shufflenet_v2_x0_5", 47, 0.1, 0.9, 1e-4, 0.1, 1, VAL_IMAGES).eval()
    batches = list(script.Loader(script.LoaderConfig(index, False, 10, 32, 36)))
    with torch.no_grad():
        for n, batch in enumerate(batches):
            model.validation_step(batch, n)
        images, labels = (torch.cat(part)[:VAL_IMAGES] for part in zip(*batches))
        logits = model(images)
    top5 = (logits.topk(5).indices == labels[:, None]).any(1).float().mean()
    assert model.seen.compute() == VAL_IMAGES
    torch.testing.assert_close(model.accuracy.compute()["val_top1"], (logits.argmax(1) == labels).float().mean())
    torch.testing.assert_close(model.accuracy.compute()["val_top5"], top5)
    torch.testing.assert_close(model.loss.compute(), torch.nn.functional.cross_entropy(logits, labels))


def test_normalisation_is_torchvisions():
    import torchvision.transforms.v2.functional as oracle

    model = script.Classifier("resnet18", 10, 0.1, 0.9, 1e-4, 0.1, 1, 10)
    model.model = torch.nn.Identity()
    images = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    expected = oracle.normalize(images.permute(0, 3, 1, 2) / 255, script.MEAN, script.STD)
    torch.testing.assert_close(model(images), expected)
    assert model(images).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["resnet50", "googlenet", "inception_v3", "vit_b_32", "mobilenet_v3_small"])
def test_any_model_with_the_shards_classes(name):
    model = script.build_model(name, 7).eval()
    assert model(torch.zeros(1, 3, 224, 224)).shape == (1, 7)
    decayed = [n for n, p in model.named_parameters() if p.ndim > 1]
    assert decayed and not any(n.endswith("bias") for n in decayed)


# ---------------------------------------------------------------- what users get wrong


WRONG = {
    "--shards=/nowhere": "--shards=/nowhere: no such folder; imagenet_shards.py makes it",
    "--base=az://bucket/x": "name a command",
    "--resume=/nowhere.ckpt": "--resume=/nowhere.ckpt: No such file or directory",
    "--resume=/etc/passwd": "--resume=/etc/passwd: not a checkpoint of this script",
    "--batch-size=61": "--batch-size=61 × 1 ranks: more than the 60 training images",
    "--accelerator=warp": "--accelerator=warp",
    "--devices=x": "--devices=x",
    "--precision=7": "--precision=7",
    "--model=vit_b_16": "--model=vit_b_16 takes no images of 32 × 32 px: Wrong image height",
    "--output=/dev/null/x": "/dev/null",
    "--preview=/dev/null/x.png": "/dev/null: File exists",
}


@pytest.mark.quick
@pytest.mark.parametrize("flag", WRONG)
def test_wrong_input_gets_one_clear_line(shards, tmp_path, capsys, flag):
    assert train(shards, tmp_path / "out", flag) == 1
    error = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(error) == 1 and error[0].startswith("imagenet_train.py: ") and WRONG[flag] in error[0]


@pytest.mark.quick
@pytest.mark.parametrize(
    "flag",
    ["--model=resnet1", "--batch-size=0", "--lr=-1", "--val-size=300", "--max-epochs=x", "--bogus", "--preview=x.jpg"],
)
def test_bad_flags(shards, tmp_path, capsys, flag):
    with pytest.raises(SystemExit) as stop:
        train(shards, tmp_path / "out", flag)
    assert stop.value.code == 2 and flag.split("=")[0] in capsys.readouterr().err


def test_bare_resume_without_a_checkpoint_is_a_fresh_start(shards, tmp_path, capsys):
    assert train(shards, tmp_path / "out", "--resume", "--max-steps=2") == 0
    assert f"no version_N/last.ckpt in {tmp_path}/out yet; starting from the beginning" in capsys.readouterr().out


def test_splits_of_different_trees_are_refused(shards, unique, tmp_path, capsys):
    folder = shutil.copytree(shards, tmp_path / "data")
    for path in unique.glob("imagenet-val*"):
        shutil.copy(path, folder)
    assert train(folder, tmp_path / "out") == 1
    assert "train and val have different classes" in capsys.readouterr().err


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_device_is_not_waited_for_in_every_step(shards, tmp_path, ranks):
    """Reading a number off a tensor waits for the device: between two log entries no step may."""
    flags = [f"--shards={shards}", f"--output={tmp_path}/out", "--max-epochs=1", "--log-every=5", "--batch-size=3"]
    run = record(tmp_path, *flags, ranks=ranks, READS="1")
    assert run.returncode == 0, run.stderr[-2000:]
    for rank in range(ranks):
        counts = list(map(int, (tmp_path / f"reads-{rank}.txt").read_text().split()))
        steps = [after - before for before, after in zip(counts, counts[1:])]
        assert len(counts) == 20 // ranks
        assert [n for n, reads in enumerate(steps) if reads] == list(range(4, len(steps), 5))

