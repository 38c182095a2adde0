"""imagenet_train.py's other ways: from the raw files, and with growing images."""

import pytest
from training import TINY

import imagenet_train as script


def run(*flags: str) -> int:
    """imagenet_train.py in this process; its exit status."""
    return script.main([*TINY, "--workers=1", *flags])


# ---------------------------------------------------------------- --imagenet


def test_training_from_files(tree, tmp_path, capsys):
    assert run(f"--imagenet={tree}", f"--output={tmp_path}", "--max-epochs=1") == 0
    out = capsys.readouterr().out
    assert "60 train images in 60 files, 30 val in 30" in out and "validated 30/30 images" in out


def test_shards_and_files_at_once_are_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        run("--imagenet=a", "--shards=b")
    assert stop.value.code == 2 and "not allowed with argument" in capsys.readouterr().err


# ---------------------------------------------------------------- --progressive


def test_training_with_growing_images(shards, tmp_path, capsys):
    flags = ["--max-epochs=2", "--train-size=64", "--progressive=32"]
    assert run(f"--shards={shards}", f"--output={tmp_path}", *flags) == 0
    assert capsys.readouterr().out.count("validated 30/30 images") == 2
    with pytest.raises(SystemExit):
        run(f"--shards={shards}", "--progressive=64")
    assert "--progressive 64 is more than --train-size 32" in capsys.readouterr().err
