"""imagenet_train.py's command line: flags, one-line errors, the output folder, what must not be printed or stored."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from faults import fault_server
from runs import checkpoint, one_line, rows, run, train

import imagenet_train as script


@pytest.mark.quick
@pytest.mark.parametrize("flags, said", [
    ("--bathc-size=4", "unrecognized arguments: --bathc-size"), ("./SECRET", "unrecognized arguments: a word without"),
    ("--shards=pipe:curl --SECRET=SECRET", "unrecognized arguments: --; give"), ("-H SECRET", "unrecognized arguments"),
    ("--lr 1 SECRET:SECRET@x", "unrecognized arguments: a word"), ("--batch-size=0", "--batch-size: '0' is"),
    ("--model=resnet51", "--model: invalid choice: 'resnet51' (choose from "), ("--seed=-1", "--seed: '-1' is not"),
    ("--evaluate", "--evaluate: give --weights or --resume"), ("--lr=x", "--lr: "), ("--lr=nan", "--lr: 'nan' is not"),
    ("--evaluate --weights=a --resume=b", "--evaluate: give --weights or"), ("--shards=", "the value is empty"),
    ("--val-size=300", "--val-size 300 does not fit into --val-resize 256"),
    ("--output=", "--output: the value is empty"), ("--output=s3://b/x", "--output: s3://b/x"),
    ("--cache=gs://b/x", "--cache: gs://b/x"), ("--resume=", "--resume: the value is empty"),
    ("--resume=s3://b/x", "--resume: s3://b/x"),
])
def test_wrong_flags_are_one_line_with_status_2(capsys, flags, said):
    with pytest.raises(SystemExit) as stop:
        script.main(flags.split())
    line = one_line(capsys)
    assert stop.value.code == 2 and said in line and len(line) < 6000 and "SECRET" not in line


WRONG = {
    "--shards=./dta": "dta/imagenet-train.json: no such file; there is no such folder",
    "--resume=/nowhere.ckpt": "--resume=/nowhere.ckpt: No such file or directory",
    "--resume=/etc/passwd": "--resume=/etc/passwd: not a ",
    "--weights=/nowhere.pt": "--weights=/nowhere.pt: no such file; ",
    "--batch-size=1 --train-size=32 --model=shufflenet_v2_x0_5":
        "1 image of 32 × 32 px: Expected more than 1 value per channel",
    "--accelerator=warp": "--accelerator=warp", "--accelerator=tpu": "--accelerator=tpu", "--devices=x": "--devices=x",
    "--precision=7": "--precision=7", "--precision=transformer-engine": "--precision=transformer-engine",
    "--model=vit_b_16": "--model=vit_b_16, 4 images of 32 × 32 px: Wrong image height",
    "--output=/dev/null/x": "/dev/null", "--preview=/dev/null/x.png": "/dev/null",
}


@pytest.mark.quick
@pytest.mark.parametrize("flags", WRONG)
def test_wrong_input_is_one_line_with_status_1(shards, tmp_path, capsys, flags):
    assert train(shards, tmp_path / "out", *flags.split()) == 1
    assert WRONG[flags] in one_line(capsys)
    assert not (tmp_path / "out").exists() or " px: " in WRONG[flags]  # a failed check leaves no folder


def test_classes_that_do_not_fit_are_refused(shards, unique, tmp_path, capsys):
    """Splits of different trees; a checkpoint of another model, or of as many other classes."""
    mixed, other = shutil.copytree(shards, tmp_path / "mixed"), shutil.copytree(shards, tmp_path / "other")
    for path in unique.glob("imagenet-val*"):
        shutil.copy(path, mixed)
    assert train(mixed, tmp_path / "out") == 1
    assert "train and val have different classes" in one_line(capsys)
    assert train(shards, tmp_path / "out", "--max-steps=1") == 0
    assert train(shards, tmp_path / "out", "--resume", "--model=squeezenet1_1") == 1
    assert "of --model=tiny, not squeezenet1_1; " in one_line(capsys)
    for path in other.glob("*.json"):  # the classes' names alone
        path.write_text(re.sub(r"\bn(\d{8})\b", r"m\1", path.read_text()))
    names = [json.loads((folder / "imagenet-val.json").read_text())["classes"][0] for folder in (shards, other)]
    last = tmp_path / "out/version_0/last.ckpt"
    for flags in (["--resume"], ["--resume", "--evaluate"], [f"--weights={last}", "--evaluate"]):
        assert train(other, tmp_path / "out", *flags) == 1
        assert "class 0 is {} there, {} here".format(*names) in one_line(capsys)
    assert train(unique, tmp_path / "new", f"--weights={last}", "--max-steps=1") == 0
    assert re.search("not for 47 classes; the last layer, .*, starts at random", capsys.readouterr().out)


ENTRIES = ["state_dict", "optimizer_states", "optimizer_states 0", "lr_schedulers", "loops", "loops fit_loop",
           "callbacks", "callbacks Results", "callbacks Results best", "callbacks Results loader",
           "callbacks Results loader history", "classes", "global_step", "hyper_parameters", "hyper_parameters model",
           "pytorch-lightning_version"]


def test_a_checkpoint_that_lacks_an_entry(shards, tmp_path, capsys):
    """One line, and no folder."""
    assert train(shards, tmp_path, "--max-steps=1") == 0
    [last] = tmp_path.rglob("last.ckpt")
    for entry in ENTRIES:
        content = parent = torch.load(last, weights_only=True)
        *above, key = (int(word) if word.isdigit() else word for word in entry.split())
        for word in above:
            parent = parent[word]
        del parent[key]
        torch.save(content, tmp_path / "cut.ckpt")
        capsys.readouterr()
        assert train(shards, tmp_path / "out", f"--resume={tmp_path}/cut.ckpt", "--max-steps=2") == 1, entry
        assert f"--resume={tmp_path}/cut.ckpt: not a checkpoint" in one_line(capsys), entry
        assert not (tmp_path / "out").exists(), entry


def test_a_launcher_with_another_number_of_processes(shards, tmp_path, capsys, monkeypatch):
    """torchrun's, where --devices is given, and Slurm's must be equal to it."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train(shards, tmp_path, "--devices=1") == 1
    assert "--devices=1 --num-nodes=1: 1 rank, but the launcher started 2; make them equal" in one_line(capsys)
    monkeypatch.delenv("WORLD_SIZE")
    slurm = "NTASKS=4 NTASKS_PER_NODE=2 JOB_NAME=train JOB_ID=1 PROCID=0 NODEID=0 LOCALID=0"
    for name, value in (word.split("=") for word in slurm.split()):
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert train(shards, tmp_path, "--devices=2") == 1
    assert "2 ranks, but the launcher started 4; make them equal" in one_line(capsys)


def test_closed_outputs(shards, tmp_path, capsys, monkeypatch):
    """stdout that is closed from the start does not matter; a reader that has enough ends the run, in one line."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        assert train(shards, tmp_path, "--max-steps=1") == 0
        reader, writer = os.pipe()
        os.close(reader)
        patch.setattr(sys, "stdout", os.fdopen(writer, "w", buffering=1))
        assert train(shards, tmp_path, "--max-steps=1") == 1
    assert one_line(capsys) == "imagenet_train.py: Broken pipe"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_each_run_has_a_folder_and_resume_continues_the_last(shards, tmp_path, capsys):
    """The highest version_N with a last.ckpt, by number alone; it is named. From elsewhere into a new folder."""
    out = tmp_path / "out"
    assert train(shards, out, "--resume") == 0
    assert f"no version_N/last.ckpt in {out} yet; starting from the beginning" in capsys.readouterr().out
    first = contents(out / "version_0")
    assert train(shards, out) == 0
    assert contents(out / "version_0") == first and set(contents(out / "version_1")) == set(first)
    (out / "version_1").rename(out / "version_10")  # 10 is higher than 9, 2 and 0
    os.utime(out / "version_10" / "last.ckpt", (0, 0))
    for name in ("version_9", "version_11"):
        (out / name).mkdir()
    before = rows(out / "version_10")
    assert train(shards, out, "--resume", "--max-epochs=2") == 0
    assert f"resuming {out}/version_10/last.ckpt in epoch 2" in capsys.readouterr().out
    assert rows(out / "version_10")[: len(before)] == before and contents(out / "version_0") == first
    assert [row["epoch"] for row in rows(out / "version_10") if row["val_top1"]] == ["1.0", "2.0"]
    shutil.copytree(out / "version_0", tmp_path / "elsewhere")
    for number, path in ((12, tmp_path / "elsewhere"), (13, out / "version_0" / "best.ckpt")):
        assert train(shards, out, f"--resume={path}", "--max-epochs=2") == 0
        assert [row["epoch"] for row in rows(out / f"version_{number}") if row["val_top1"]] == ["2.0"]
        assert (out / f"version_{number}" / "model.pt").exists()  # its best epoch, though the one before was better
    assert contents(out / "version_0") == first


def test_a_finished_run_says_so(shards, tmp_path, capsys, monkeypatch):
    """With status 0, so that a pod that is started once more succeeds; model.pt is written if it is missing.

    Also: a ~ that the shell leaves is expanded, and the largest seed is used.
    """
    monkeypatch.setenv("HOME", str(tmp_path))
    flags = shards, "~/out", "--cache=~/cache", f"--seed={2**32 - 1}"
    assert train(*flags, "--max-steps=4") == train(*flags, "--max-steps=4", "--resume=~/out/version_0") == 0
    assert "last.ckpt: already at epoch 0, step 4; raise --max-epochs or --max-steps" in capsys.readouterr().out
    assert train(*flags, "--resume") == 0
    (tmp_path / "out/version_0/model.pt").unlink()
    before = contents(tmp_path / "out/version_0")
    assert train(*flags, "--resume") == 0
    assert "last.ckpt: already at epoch 1, step 15; raise --max-epochs or" in capsys.readouterr().out
    after = contents(tmp_path / "out/version_0")
    assert after.pop("model.pt") and after == before and sorted(os.listdir(tmp_path)) == ["cache", "out"]


def test_runs_that_start_at_once_take_a_number_each(shards, tmp_path, monkeypatch):
    """Another run makes the folder after this one has chosen its name. What is no folder has a number too."""
    (tmp_path / "version_2").symlink_to("nowhere")
    (tmp_path / "version_3").touch()
    listdir = os.listdir

    def list_and_take(path: Path) -> list[str]:
        names = listdir(path)
        if path == tmp_path and "version_4" not in names:
            (tmp_path / "version_4").mkdir()
        return names

    monkeypatch.setattr(os, "listdir", list_and_take)
    assert train(shards, tmp_path, "--max-steps=2") == 0
    assert not listdir(tmp_path / "version_4") and checkpoint(tmp_path / "version_5")["global_step"] == 2


def test_no_secret_is_printed_or_stored(shards, tmp_path):
    """A password, a query and a token in a command: in no line, log, settings or checkpoint; also if the read fails."""
    with fault_server(shards) as server:
        url = server.url.replace("//", "//me:SECRET1@")
        for number, prefix in enumerate((f"{url}%s?sig=SECRET2", f"pipe:curl -sf -H 'Authorization: SECRET3' {url}%s")):
            run(tmp_path / str(number), f"--shards={prefix}", "--max-epochs=1", "--cache=" + str(tmp_path / "cache"))
            run(tmp_path / str(number), f"--shards={prefix}", "--evaluate", "--resume")
            run(tmp_path / str(number), f"--shards={prefix.replace('%s', 'x%s')}", "--retry-for=0", expect=1)
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or not re.search(b"SECRET|sig=", path.read_bytes()), path
    assert len(list(tmp_path.rglob("metrics.json"))) == 4
