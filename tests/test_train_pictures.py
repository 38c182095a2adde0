"""imagenet_train.py's pictures: --preview and curves.png."""

import json
import sys
from dataclasses import replace

import matplotlib.figure
import numpy
import pytest
import torch
from PIL import Image
from runs import one_line, rows, train

import imagenet_train as script

# ---------------------------------------------------------------- --preview

SIZE, COUNT = 160, 9


def likeness(a: torch.Tensor, b: torch.Tensor) -> float:
    """The correlation of two images [3, S, S], without their edges, where one has the outline."""
    inner = slice(SIZE // 5, -SIZE // 5)
    return numpy.corrcoef(a[:, inner, inner].flatten(), b[:, inner, inner].flatten())[0, 1]


@pytest.mark.parametrize("named", [True, False])
def test_preview_shows_what_the_model_sees(shards, tmp_path, monkeypatch, named):
    """Beside each original with its class and the crop's outline, whose inside is what the model sees, or its mirror
    image. Classes have the names of the index, or else their wnids.
    """
    index = replace(script.read_index(str(shards), "train"),
                    class_names=[f"kind {number}, also called so" for number in range(10)] if named else None)
    images, labels = next(iter(script.Loader(script.LoaderConfig(index, True, COUNT, SIZE, shuffle=5))))
    monkeypatch.setattr(script, "read_indexes", lambda *args: [index, index])
    drawn, draw = [], script.draw_bounding_boxes
    monkeypatch.setattr(script, "draw_bounding_boxes", lambda *args, **options: drawn.append(args) or draw(
        *args, **options))
    path = tmp_path / "new folder" / "sheet.png"
    assert train(shards, tmp_path / "out", f"--preview={path}", f"--train-size={SIZE}", f"--batch-size={COUNT}") == 0
    sheet, side = Image.open(path), SIZE + 4
    assert sheet.size == (6 * side + 4, 3 * side + 4) and not (tmp_path / "out").exists() and len(drawn) == COUNT
    for position, (original, box, [name], *style) in enumerate(drawn):
        cells = [(left * side + 4, position // 3 * side + 4) for left in (position % 3 * 2, position % 3 * 2 + 1)]
        left, right = (sheet.crop((x, y, x + SIZE, y + SIZE)) for x, y in cells)
        shown = script.center_crop(draw(original, box, [name], *style, width=2), SIZE)
        assert left.tobytes() == shown.permute(1, 2, 0).numpy().tobytes()
        assert right.tobytes() == images[position].numpy().tobytes()
        assert name == (f"kind {labels[position]}" if named else index.classes[labels[position]])
        x0, y0, x1, y1 = (round(number) for number in box[0].tolist())
        inside = script.resize(original[:, y0:y1, x0:x1], (SIZE, SIZE)).double()
        seen = images[position].permute(2, 0, 1).double()
        assert max(likeness(inside, seen), likeness(inside.flip(2), seen)) > 0.6, position


def test_preview_leaves_out_what_cannot_be_decoded(shards, tmp_path, capsys, monkeypatch):
    """Of a batch of more than 32 images it takes 32."""
    decode, bad = script.decode, set(range(3))
    monkeypatch.setattr(script, "decode", lambda sample, config, epoch: (
        (None, "damaged") if int(sample["cls"]) in bad else decode(sample, config, epoch)))
    preview = shards, tmp_path, f"--preview={tmp_path}/sheet.png", "--batch-size=256"
    assert train(*preview) == 0
    assert 15 < int(capsys.readouterr().out.partition("sheet.png: ")[2].partition(" images, ")[0]) < 32
    bad |= set(range(10))
    assert train(*preview) == 1
    assert "no image" in one_line(capsys)


# ---------------------------------------------------------------- curves.png


@pytest.fixture
def drawn(monkeypatch) -> list[matplotlib.figure.Figure]:
    """The figures that are saved."""
    figures, save = [], matplotlib.figure.Figure.savefig
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda self, *args, **options: (
        figures.append(self), save(self, *args, **options)))
    return figures


def test_curves_show_the_log(shards, tmp_path, drawn):
    """After each epoch. A power cut left a part of an entry, and bytes that are no text: these are dropped."""
    assert train(shards, tmp_path, "--max-epochs=2") == 0
    log = tmp_path / "version_0" / "metrics.csv"
    before = log.read_bytes()
    log.write_bytes(before + b"0.93,0.1,1\x00\xff")
    assert train(shards, tmp_path, "--max-epochs=3", "--resume") == 0
    assert log.read_bytes().startswith(before) and len(drawn) == 3
    entries, shown = rows(tmp_path), {line.get_label(): line for axes in drawn[-1].axes for line in axes.lines}
    assert {*shown} == {"train_loss", "val_loss", "val_top1", "val_top5", "lr", "train_images/s"}
    for name, line in shown.items():
        curve = [(float(row["epoch"]), float(row[name])) for row in entries if row[name]]
        assert [*zip(line.get_xdata(), line.get_ydata())] == curve == sorted(curve)
        validation = name.startswith("val")
        assert [x for x, _ in curve] == [1, 2, 3] if validation else 0 <= curve[0][0] < 0.2 and curve[-1][0] > 2.8
    assert Image.open(log.with_name("curves.png")).size == (1080, 720)


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


@pytest.mark.filterwarnings("error:No artists")
def test_without_an_entry_of_training_there_are_curves_of_validation(shards, tmp_path, capsys):
    assert train(shards, tmp_path, "--log-every=100") == 0
    assert Image.open(tmp_path / "version_0" / "curves.png").size == (1080, 720) and not capsys.readouterr().err


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
