"""imagenet_train.py's command line: flags, one-line errors, the output folder, what must not be printed or stored."""

import os
import re
import resource
import shutil
import sys
from pathlib import Path

import pytest
from conftest import convert
from faults import fault_server
from runs import one_line, rows, run, train
from standin import make_tree

import imagenet_train as script


@pytest.mark.quick
@pytest.mark.parametrize("flags, said", [
    ("--bathc-size=4", "unrecognized arguments: --bathc-size"), ("./data", "unrecognized arguments: ./data"),
    ("--batch-size=2 --batch-size=4", "argument --batch-size: given twice"), ("--batch-size=0", "--batch-size: '0' is"),
    ("--model=resnet51", "--model: invalid choice: 'resnet51' (choose from "), ("--seed=-1", "--seed: '-1' is not"),
    ("--evaluate", "--evaluate: give --weights or --resume"), ("--lr=x", "--lr: "), ("--lr=nan", "--lr: 'nan' is not"),
    ("--evaluate --weights=a --resume=b", "--evaluate: give --weights or"), ("--shards=", "the value is empty"),
    ("--val-size=300", "--val-size 300 does not fit into --val-resize 256"), ("--preview=x.jpg", "ends in .png"),
    ("--output=", "--output: the value is empty"), ("--output=s3://b/x", "--output: s3://b/x"),
    ("--cache=gs://b/x", "--cache: gs://b/x"), ("--resume=", "--resume: the value is empty"),
    ("--resume=s3://b/x", "--resume: s3://b/x"),
])
def test_wrong_flags_are_one_line_with_status_2(capsys, flags, said):
    with pytest.raises(SystemExit) as stop:
        script.main(flags.split())
    line = one_line(capsys)
    assert stop.value.code == 2 and said in line and len(line) < 6000


WRONG = {
    "--shards=./dta": "--shards=./dta: no such folder; ",
    "--resume=/nowhere.ckpt": "--resume=/nowhere.ckpt: No such file or directory",
    "--resume=/etc/passwd": "--resume=/etc/passwd: not a ",
    "--weights=/nowhere": "--weights=/nowhere: no such file; ",
    "--batch-size=61": "--batch-size=61 × 1 rank: more than the 60 training images; give a smaller one",
    "--batch-size=1 --train-size=32 --model=shufflenet_v2_x0_5":
        "does not accept 1 image of 32 × 32 px: Expected more than 1 value per channel",
    "--accelerator=warp": "--accelerator=warp", "--accelerator=tpu": "--accelerator=tpu", "--devices=x": "--devices=x",
    "--precision=7": "--precision=7", "--precision=transformer-engine": "--precision=transformer-engine",
    "--model=vit_b_16": "--model=vit_b_16: does not accept 4 images of 32 × 32 px: Wrong image height",
    "--output=/dev/null/x": "/dev/null", "--preview=/dev/null/x.png": "/dev/null",
}


@pytest.mark.quick
@pytest.mark.parametrize("flags", WRONG)
def test_wrong_input_is_one_line_with_status_1(shards, tmp_path, capsys, flags):
    assert train(shards, tmp_path / "out", *flags.split()) == 1
    assert WRONG[flags] in one_line(capsys)
    assert not (tmp_path / "out").exists() or "does not accept" in WRONG[flags]  # a failed check leaves no folder


def test_classes_that_do_not_fit_are_refused(shards, unique, tmp_path, capsys):
    """Splits of different trees; a single class; a checkpoint of another model."""
    folder = shutil.copytree(shards, tmp_path / "data")
    for path in unique.glob("imagenet-val*"):
        shutil.copy(path, folder)
    assert train(folder, tmp_path / "out") == 1
    assert "train and val have different classes" in one_line(capsys)
    make_tree(tmp_path / "tree", train=4, val=2, classes=1)
    assert convert(tmp_path / "tree", tmp_path / "one") == 0
    assert train(tmp_path / "one", tmp_path / "out") == 1
    assert "has only the class n02128385; training needs two or more" in capsys.readouterr().err
    assert train(shards, tmp_path / "out", "--max-steps=1") == 0
    assert train(shards, tmp_path / "out", "--resume", "--model=squeezenet1_1") == 1
    assert "for 10 classes of tiny, not 10 classes of squeezenet1_1" in one_line(capsys)


def test_a_launcher_with_another_number_of_processes(shards, tmp_path, capsys, monkeypatch):
    """torchrun's is the default of --devices; where that is not used, the numbers must be equal. Slurm's is srun's."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train(shards, tmp_path, "--devices=1") == 1
    assert "1 rank, but the launcher's number of processes is 2 (WORLD_SIZE); make them equal" in one_line(capsys)
    monkeypatch.delenv("WORLD_SIZE")
    slurm = "NTASKS=4 NTASKS_PER_NODE=2 JOB_NAME=train JOB_ID=1 PROCID=0 NODEID=0 LOCALID=0"
    for name, value in (word.split("=") for word in slurm.split()):
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert train(shards, tmp_path, "--devices=2") == 1
    assert "2 ranks, but srun's --ntasks number of processes is 4 (SLURM_NTASKS); make them eq" in one_line(capsys)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    args = script.parse_args([])
    assert (args.devices, args.num_nodes) == ("3", 2)


def test_help_shows_defaults_that_say_something(capsys):
    with pytest.raises(SystemExit) as stop:
        script.parse_args(["--help"])
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert stop.value.code == 0 and "(default: None)" not in text and "(default: False)" not in text
    assert "--seed N determines initial weights, order, crops and flips (default: 0)" in text
    assert "not applied to norms and biases (default: 1/32768)" in text and "momentum of SGD (default: 0.875)" in text


@pytest.mark.parametrize("seed", [185_000_000, 2**32 - 1])
def test_any_seed_trains(shards, tmp_path, seed):
    """The seed of the random numbers of each step fits into 64 bits."""
    assert train(shards, tmp_path, f"--seed={seed}", "--max-steps=2") == 0


# ---------------------------------------------------------------- the machine


def test_too_little_memory(shards, tmp_path, monkeypatch):
    """A real limit of the address space, which a batch of large images exceeds."""
    read_indexes = script.read_indexes

    def limit_memory(*args) -> list:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + (600 << 20), size + (600 << 20)))
        return read_indexes(*args)

    monkeypatch.setattr(script, "read_indexes", limit_memory)
    flags = ["--model=resnet50", "--train-size=640", "--batch-size=40", f"--shards={shards}"]
    out = run(tmp_path, *flags, workers=0, expect=1)
    assert "this machine has too little memory; give a smaller --batch-size" in out and "Traceback" not in out


def test_closed_outputs(shards, tmp_path, capsys, monkeypatch):
    """stdout that is closed from the start does not matter; a reader that has enough ends the run, in one line."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        assert train(shards, tmp_path, "--max-steps=1") == 0
        reader, writer = os.pipe()
        os.close(reader)
        patch.setattr(sys, "stdout", os.fdopen(writer, "w", buffering=1))
        assert train(shards, tmp_path, "--max-steps=1") == 1
    assert one_line(capsys) == "imagenet_train.py: standard output was closed"


# ---------------------------------------------------------------- the output folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_each_run_has_a_folder_and_resume_continues_the_newest(shards, tmp_path, capsys):
    """--resume without a checkpoint starts; from a last.ckpt in --output it continues there, or else in another."""
    out = tmp_path / "out"
    assert train(shards, out, "--resume") == 0
    assert f"no version_N/last.ckpt in {out} yet; starting from the beginning" in capsys.readouterr().out
    first = contents(out / "version_0")
    assert train(shards, out) == 0
    assert contents(out / "version_0") == first and set(contents(out / "version_1")) == set(first)
    os.utime(out / "version_1" / "last.ckpt", (0, 0))  # so the first one was written last
    second, before = contents(out / "version_1"), rows(out / "version_0")
    assert train(shards, out, "--resume", "--max-epochs=2") == 0
    assert rows(out / "version_0")[: len(before)] == before and contents(out / "version_1") == second
    assert [row["epoch"] for row in rows(out / "version_0") if row["val_top1"]] == ["1.0", "2.0"]
    shutil.copytree(out / "version_1", tmp_path / "elsewhere")
    for number, path in ((2, tmp_path / "elsewhere"), (3, out / "version_1" / "best.ckpt")):
        assert train(shards, out, f"--resume={path}", "--max-epochs=2") == 0
        assert [row["epoch"] for row in rows(out / f"version_{number}") if row["val_top1"]] == ["2.0"]
        assert (out / f"version_{number}" / "model.pt").exists()  # its best epoch, though the one before was better
    assert contents(out / "version_1") == second and sorted(os.listdir(out)) == [f"version_{n}" for n in range(4)]


def test_a_finished_run_says_so(shards, tmp_path, capsys):
    """With status 0, so that a pod that is started once more succeeds; model.pt is written if it is missing."""
    assert train(shards, tmp_path, "--max-steps=4") == train(shards, tmp_path, "--max-steps=4", "--resume") == 0
    assert "already at step 4 of 4; raise --max-steps" in capsys.readouterr().out
    assert train(shards, tmp_path, "--resume") == 0
    (tmp_path / "version_0" / "model.pt").unlink()
    before = (tmp_path / "version_0" / "metrics.csv").read_bytes()
    assert train(shards, tmp_path, "--resume") == 0
    assert "already at epoch 1 of 1; raise --max-epochs\n" in capsys.readouterr().out
    assert (tmp_path / "version_0" / "metrics.csv").read_bytes() == before
    assert (tmp_path / "version_0" / "model.pt").exists()


def test_runs_that_start_at_once_take_a_number_each(shards, tmp_path, monkeypatch):
    """Another run makes the folder after this one has chosen its name."""
    log_dir, taken = script.CSVLogger.log_dir.fget, []

    def take(logger: script.CSVLogger) -> str:
        path = log_dir(logger)
        if not taken:
            Path(path).mkdir(parents=True)
            taken.append(path)
        return path

    monkeypatch.setattr(script.CSVLogger, "log_dir", property(take))
    assert train(shards, tmp_path, "--max-steps=2") == 0
    assert taken == [f"{tmp_path}/version_0"] and not os.listdir(taken[0])
    assert {"last.ckpt", "hparams.yaml"} <= set(contents(tmp_path / "version_1"))


def test_a_home_folder_is_expanded(shards, tmp_path, monkeypatch):
    """Though the shell leaves --output=~/out as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert train(shards, "~/out", "--max-steps=1", "--cache=~/cache") == 0
    assert train(shards, "~/out", "--max-steps=2", "--resume=~/out/version_0") == 0
    assert sorted(os.listdir(tmp_path)) == ["cache", "out"] and os.listdir(tmp_path / "out") == ["version_0"]


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
    assert len(list(tmp_path.rglob("metrics.json"))) == 4 and len(list(tmp_path.rglob("hparams.yaml"))) == 2
