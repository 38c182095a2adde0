"""imagenet_train.py's pictures: --preview and curves.png."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib.figure
import numpy
import pytest
from conftest import convert
from PIL import Image
from runs import one_line, rows, train
from standin import make_tree

import imagenet_train as script

# ---------------------------------------------------------------- --preview

SIZE, COUNT, COLUMNS = 160, 9, 3


def sheet_of(shards: Path, path: Path) -> Image.Image:
    flags = [f"--preview={path}", f"--train-size={SIZE}", f"--batch-size={COUNT}"]
    assert train(shards, path.parent / "out", *flags) == 0
    return Image.open(path)


def test_preview_shows_what_the_model_sees(shards, tmp_path, capsys):
    path = tmp_path / "new folder" / "sheet.png"
    sheet = sheet_of(shards, path)
    assert str(path) in capsys.readouterr().out and not (path.parent / "out").exists()
    index = script.read_index(str(shards), "train")
    images, _ = next(iter(script.Loader(script.LoaderConfig(index, True, COUNT, SIZE, shuffle=5))))
    assert sheet.size == (COLUMNS * (2 * SIZE + 12) + 8, 3 * (SIZE + 28) + 4)
    for position in range(COUNT):
        left = position % COLUMNS * (2 * SIZE + 12) + 8 + SIZE + 2
        top = position // COLUMNS * (SIZE + 28) + 4
        assert sheet.crop((left, top, left + SIZE, top + SIZE)).tobytes() == images[position].numpy().tobytes()


def test_preview_draws_the_crop_on_the_original(shards, tmp_path):
    """The part inside of the red outline, enlarged, is what the model sees, or its mirror image."""
    sheet = sheet_of(shards, tmp_path / "sheet.png")
    for position in range(COUNT):
        left, top = position % COLUMNS * (2 * SIZE + 12) + 8, position // COLUMNS * (SIZE + 28) + 4
        original = sheet.crop((left, top, left + SIZE, top + SIZE))
        seen = numpy.asarray(sheet.crop((left + SIZE + 2, top, left + 2 * SIZE + 2, top + SIZE)), dtype=float)
        red = (numpy.asarray(original) == (255, 0, 0)).all(2).nonzero()
        box = red[1].min(), red[0].min(), red[1].max() + 1, red[0].max() + 1
        inside = Image.fromarray(numpy.asarray(original)).resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box)
        inside = numpy.asarray(inside, dtype=float)

        def likeness(a: numpy.ndarray, b: numpy.ndarray) -> float:
            inner = slice(SIZE // 5, -SIZE // 5)  # without the outline
            return numpy.corrcoef(a[inner, inner].ravel(), b[inner, inner].ravel())[0, 1]

        assert max(likeness(inside, seen), likeness(inside[:, ::-1], seen)) > 0.6, position


def test_preview_names_the_classes(shards, tmp_path, monkeypatch):
    """With the names of the index, or else the wnids."""
    written = []
    real = script.ImageDraw.ImageDraw.text
    monkeypatch.setattr(script.ImageDraw.ImageDraw, "text", lambda self, place, text, *rest, **options: (
        written.append(text), real(self, place, text, *rest, **options)))
    sheet_of(shards, tmp_path / "sheet.png")
    index = script.read_index(str(shards), "train")
    known = [name.split(",")[0].split()[0] for name in index.class_names or index.classes]
    assert len(written) == COUNT and all(text.split()[1] in known for text in written)
    index = replace(index, class_names=[f"kind {number}, also called so" for number in range(10)])
    config = script.LoaderConfig(index, True, COUNT, SIZE, shuffle=5)
    labels = [text.split()[0] for text in written]
    written.clear()
    script.preview(config, tmp_path / "named.png")
    assert written == [f"{label}  kind {label}" for label in labels]


def test_preview_leaves_out_what_cannot_be_decoded(shards, tmp_path, capsys, monkeypatch):
    """Of a batch of more than 32 images it draws 32."""
    decode = script.decode
    monkeypatch.setattr(script, "decode", lambda sample, config, epoch: (
        (None, "damaged") if int(sample["cls"]) < 3 else decode(sample, config, epoch)))
    assert train(shards, tmp_path, f"--preview={tmp_path}/sheet.png", "--batch-size=256") == 0
    assert Image.open(tmp_path / "sheet.png").width > 100
    assert "sheet.png: 32 images of the first training batch" in capsys.readouterr().out


def test_preview_of_fewer_images_than_a_batch(tmp_path, capsys):
    make_tree(tmp_path / "tree", train=2, val=1, classes=2)
    assert convert(tmp_path / "tree", tmp_path / "data") == 0
    assert train(tmp_path / "data", tmp_path, f"--preview={tmp_path}/sheet.png", "--batch-size=256") == 0
    assert "sheet.png: 4 images of the first training batch" in capsys.readouterr().out


# ---------------------------------------------------------------- curves.png


@pytest.fixture
def drawn(monkeypatch) -> list[matplotlib.figure.Figure]:
    """The figures that are saved."""
    figures = []
    real = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda self, *args, **options: (
        figures.append(self), real(self, *args, **options)))
    return figures


def test_curves_show_the_log(shards, tmp_path, drawn):
    assert train(shards, tmp_path, "--max-epochs=2") == 0
    assert train(shards, tmp_path, "--max-epochs=3", "--resume") == 0
    version = tmp_path / "version_0"
    assert len(drawn) == 3  # after each epoch
    entries = rows(tmp_path)
    loss, accuracy, rate, speed = drawn[-1].axes
    assert [axes.get_title() for axes in drawn[-1].axes] == ["loss", "accuracy, %", "learning rate", "images/s"]
    top1, top5 = accuracy.lines
    assert list(top1.get_xdata()) == list(top5.get_xdata()) == [1, 2, 3]
    assert list(top1.get_ydata()) == [100 * float(row["val_top1"]) for row in entries if row["val_top1"]]
    training, validation = loss.lines
    assert list(training.get_ydata()) == [float(row["train_loss"]) for row in entries if row["train_loss"]]
    assert list(validation.get_ydata()) == [float(row["val_loss"]) for row in entries if row["val_loss"]]
    epochs = training.get_xdata()
    assert sorted(epochs) == list(epochs) and 0 <= epochs[0] < 0.2 and epochs[-1] > 2.8
    assert len(rate.lines[0].get_xdata()) == len(epochs) == len(speed.lines[0].get_ydata())
    image = Image.open(version / "curves.png")
    assert image.size == (1080, 720) and not list(version.glob(".*"))


def test_repeated_steps_count_once(tmp_path, drawn):
    """Steps after the last checkpoint are made again when a killed run is resumed; the log holds both."""
    lines = ["epoch,lr,step,train_images/s,train_loss,val_loss,val_top1,val_top5",
             "0.4,0.1,1,9,5.0,,,", "0.8,0.1,3,9,4.0,,,", "0.8,0.1,3,9,3.0,,,", "1.0,,4,,,2.0,0.5,0.9"]
    (tmp_path / "metrics.csv").write_text("\n".join(lines) + "\n")
    script.draw_curves(tmp_path / "metrics.csv", tmp_path / "curves.png")
    training = drawn[0].axes[0].lines[0]
    assert list(training.get_ydata()) == [5.0, 3.0] and list(training.get_xdata()) == [0.4, 0.8]


def test_without_matplotlib_there_is_no_picture(shards, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert train(shards, tmp_path) == 0
    files = {path.name for path in (tmp_path / "version_0").iterdir()}
    assert "curves.png" not in files and "metrics.csv" in files
    assert json.loads((tmp_path / "version_0" / "metrics.json").read_text())["epoch"] == 1


def test_without_an_entry_of_training_there_are_curves_of_validation(shards, tmp_path):
    assert train(shards, tmp_path, "--log-every=100") == 0
    assert Image.open(tmp_path / "version_0" / "curves.png").size == (1080, 720)


def test_a_torn_line_of_the_log_is_dropped(shards, tmp_path, drawn, capsys):
    """A power cut or a full disk left a part of an entry, and bytes that are no text: the run goes on without them."""
    assert train(shards, tmp_path) == 0
    log = tmp_path / "version_0" / "metrics.csv"
    before = log.read_bytes()
    log.write_bytes(before + b"0.93,0.1,1\x00\xff")
    assert train(shards, tmp_path, "--max-epochs=2", "--resume") == 0
    assert log.read_bytes().startswith(before) and len(drawn) == 2 and not capsys.readouterr().err
    assert [row["epoch"] for row in rows(tmp_path) if row["val_top1"]] == ["1.0", "2.0"]


def test_a_picture_that_cannot_be_drawn_does_not_end_the_run(shards, tmp_path, capsys):
    """An entry of the log that is no number, and a folder in the place of the picture."""
    assert train(shards, tmp_path, "--max-steps=1") == 0
    version = tmp_path / "version_0"
    (version / "curves.png").mkdir()
    assert train(shards, tmp_path, "--resume") == 0
    assert "curves.png: not drawn: " in one_line(capsys)
    (version / "curves.png").rmdir()
    (version / "metrics.csv").write_text("epoch,train_loss\n0.5,x\n")
    assert train(shards, tmp_path, "--resume", "--max-epochs=2") == 0
    assert "curves.png: not drawn: could not convert string to float: 'x'" in one_line(capsys)
    assert (version / "model.pt").exists()
