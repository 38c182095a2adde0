"""imagenet_train.py's flags, messages and output folder."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from standin import make_tree
from training import SMALL, TINY, record
from warm import python

import imagenet_train as script

TOP = Path(script.__file__).parent


def train(shards: Path | str, output: Path, *flags: str) -> int:
    """imagenet_train.py in this process; its exit status."""
    return script.main([*TINY, f"--shards={shards}", f"--output={output}", "--workers=0", "--max-epochs=1", *flags])


def one_line(capsys) -> str:
    """What was printed on stderr, which must be one line of this script."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("imagenet_train.py: "), lines
    return lines[0]


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------- flags


def usage_error(capsys, *flags: str) -> str:
    with pytest.raises(SystemExit) as stop:
        script.parse_args(list(flags))
    assert stop.value.code == 2
    return one_line(capsys)


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--bathc-size", "4"], "unrecognized argument --bathc-size; did you mean --batch-size?"),
        (["--epochs=4"], "unrecognized argument --epochs=4"),
        (["./data"], "unrecognized argument ./data"),
        (["--model=resnet51"], "--model: invalid choice: 'resnet51' (choose from "),
        (["--evaluate"], "--evaluate: give --weights or --resume"),
        (["--evaluate", "--weights=a", "--resume=b"], "--evaluate: give --weights or --resume"),
        (["--recipe=17"], "--recipe: invalid choice: '17'"),
        (["--seed=-1"], "--seed: -1 is not within 0 and"),
    ],
)
def test_a_wrong_flag_is_one_line(capsys, flags, expected):
    assert expected in usage_error(capsys, *flags)


def test_help_shows_defaults_that_say_something(capsys):
    with pytest.raises(SystemExit) as stop:
        script.parse_args(["--help"])
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert stop.value.code == 0
    assert "--seed N determines initial weights, order, crops and flips (default: 0)" in text
    assert "not applied to norms and biases (default: 1/32768)" in text
    assert "(default: None)" not in text and "(default: False)" not in text and "e-05" not in text
    assert "momentum of SGD (default: 0.875)" in text


def test_recipes_are_defaults(capsys):
    long, short = script.parse_args([]), script.parse_args(["--recipe=16"])
    assert (long.max_epochs, long.lr, long.weight_decay) == (90, 0.256, 1 / 32768)
    assert (long.train_size, long.progressive, long.val_size) == (224, None, 224)
    assert (short.max_epochs, short.train_size, short.progressive, short.val_size) == (16, 192, 128, 256)
    assert short.lr * 4096 / 256 == pytest.approx(1.7)  # FFCV's, for a global batch of 4096
    mixed = script.parse_args(["--recipe=16", "--max-epochs=18", "--lr=0.2"])
    assert (mixed.max_epochs, mixed.lr, mixed.momentum) == (18, 0.2, 0.9)
    own = {"recipe", *script.RECIPES["16"]}
    shared = {name: value for name, value in vars(long).items() if name not in own}
    assert shared == {name: getattr(short, name) for name in shared}


@pytest.mark.parametrize("seed", [0, 185_000_000, 2**31, 2**32 - 1])
def test_any_seed_trains(shards, tmp_path, seed):
    """The seed of the random numbers of each step fits into 64 bits."""
    assert train(shards, tmp_path, f"--seed={seed}", "--max-steps=2") == 0


# ---------------------------------------------------------------- messages


def test_a_folder_that_does_not_exist(tmp_path, capsys):
    assert train("./dta", tmp_path) == 1
    assert one_line(capsys).startswith("imagenet_train.py: --shards=./dta: no such folder; ")


def test_a_tree_instead_of_shards(tree, tmp_path, capsys):
    assert train(tree, tmp_path) == 1
    assert f"--shards={tree}: a tree of images, not shards; " in one_line(capsys)


@pytest.mark.parametrize("command, said", [("cat {}", "No such file or directory"), ("exit 22; cat {}", "no message")])
def test_a_command_without_its_slash_is_shown_as_it_was_run(shards, tmp_path, capsys, command, said):
    """File names are appended to a prefix as they are. The message shows what that gave, and what the command said."""
    command = command.format(shards)
    assert train(f"pipe:{command}", tmp_path, "--retries=0") == 1
    line = one_line(capsys)
    assert f"pipe:{command}imagenet-train.json: the command failed with exit status" in line and said in line


def test_one_class_is_refused(tmp_path, capsys):
    make_tree(tmp_path / "tree", train=4, val=2, classes=1)
    assert script.main([*TINY, f"--imagenet={tmp_path}/tree", f"--output={tmp_path}/out"]) == 1
    assert "has only the class n02128385; training needs two or more" in one_line(capsys)
    assert not (tmp_path / "out").exists()


def test_a_finished_run_says_so(shards, tmp_path, capsys):
    """Exit status 0, so that a pod that is started once more succeeds; model.pt is written if it is missing."""
    assert train(shards, tmp_path, "--max-epochs=2") == 0
    model = tmp_path / "version_0" / "model.pt"
    model.unlink()
    log = (tmp_path / "version_0" / "metrics.csv").read_bytes()
    for epochs in (2, 1):
        capsys.readouterr()
        assert train(shards, tmp_path, "--resume", f"--max-epochs={epochs}") == 0
        out = capsys.readouterr().out
        assert f"already at epoch 2 of {epochs}; raise --max-epochs\n" in out and "images in" not in out
    assert model.exists() and (tmp_path / "version_0" / "metrics.csv").read_bytes() == log
    assert train(shards, tmp_path, "--resume", "--max-epochs=3") == 0
    assert "(epoch 3, step 45)" in capsys.readouterr().out


def test_finished_by_max_steps(shards, tmp_path, capsys):
    assert train(shards, tmp_path, "--max-steps=4") == 0
    assert train(shards, tmp_path, "--max-steps=4", "--resume") == 0
    assert "already at step 4 of 4; raise --max-steps" in capsys.readouterr().out
    assert train(shards, tmp_path, "--max-steps=6", "--resume") == 0


def test_a_checkpoint_of_another_model_is_refused(shards, tmp_path, capsys):
    assert train(shards, tmp_path, "--max-steps=1") == 0
    capsys.readouterr()
    assert train(shards, tmp_path, "--resume", "--model=squeezenet1_1") == 1
    assert "for 10 classes of tiny, not 10 classes of squeezenet1_1" in one_line(capsys)


LIMITED = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import imagenet_train
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (600 << 20), size + (600 << 20)))
sys.exit(imagenet_train.main(sys.argv[2:]))
"""


def test_too_little_memory_of_the_cpu(shards, tmp_path):
    """A real limit of the address space, which a batch of large images exceeds."""
    flags = ["--model=resnet50", "--train-size=640", "--val-size=64", "--val-resize=64", "--batch-size=40",
             "--workers=0", "--accelerator=cpu", "--shuffle=1"]
    (tmp_path / "limited.py").write_text(LIMITED)
    command = [python(), tmp_path / "limited.py", TOP, f"--shards={shards}", f"--output={tmp_path}/out", *flags]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 1 and "Traceback" not in run.stderr, run.stderr[-2000:]
    assert "imagenet_train.py: --batch-size=40: this machine has too little memory; give a smaller one" in run.stderr


def test_errors_of_files_name_the_file(shards, tmp_path, capsys, monkeypatch):
    """An OSError without a file name is not blamed on --output."""
    (tmp_path / "file").touch()
    assert train(shards, tmp_path / "file" / "out") == 1
    assert "/file" in one_line(capsys)

    def fail(*args) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(script, "run_training", fail)
    assert train(shards, tmp_path / "out") == 1
    assert one_line(capsys) == "imagenet_train.py: [Errno 24] Too many open files"


def interrupted(shards: Path, output: Path, pattern: str, *flags: str) -> tuple[int, str]:
    """Start the script, send SIGTERM once its output matches; exit status and stderr."""
    flags = (*SMALL, f"--shards={shards}", f"--output={output}", "--workers=0", *flags)
    command = [python(), TOP / "imagenet_train.py", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=0) as process:
        seen = ""
        while not re.search(pattern, seen) and (more := process.stdout.read(1)):
            seen += more
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=120)
    return process.returncode, error


def test_sigterm_names_the_checkpoint_that_there_is(shards, tmp_path):
    status, error = interrupted(shards, tmp_path / "out", "validated", "--max-epochs=50")
    assert status == 143 and f"SIGTERM: --resume continues from {tmp_path}/out/version_0/last.ckpt" in error


def test_sigterm_without_a_checkpoint_does_not_claim_one(shards, tmp_path, capsys, monkeypatch):
    def stop(*args) -> None:
        raise script.SIGTERMException

    monkeypatch.setattr(script, "run_training", stop)
    assert train(shards, tmp_path / "out") == 143
    assert one_line(capsys) == "imagenet_train.py: SIGTERM: there is no checkpoint yet"


# ---------------------------------------------------------------- the output folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_second_run_makes_a_second_version(shards, tmp_path):
    assert train(shards, tmp_path) == 0
    first = contents(tmp_path / "version_0")
    assert {"last.ckpt", "best.ckpt", "metrics.csv", "metrics.json", "model.pt"} <= set(first)
    assert train(shards, tmp_path) == 0
    assert contents(tmp_path / "version_0") == first
    assert set(contents(tmp_path / "version_1")) == set(first)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["version_0", "version_1"]


def test_resume_without_a_path_is_the_newest_run_and_keeps_its_log(shards, tmp_path, capsys):
    assert train(shards, tmp_path) == train(shards, tmp_path) == 0
    for version, age in ((0, 0), (1, 100)):  # the first one was written last
        os.utime(tmp_path / f"version_{version}" / "last.ckpt", (time.time() - age,) * 2)
    second, before = contents(tmp_path / "version_1"), rows(tmp_path / "version_0")
    assert train(shards, tmp_path, "--resume", "--max-epochs=2") == 0
    after = rows(tmp_path / "version_0")
    assert after[: len(before)] == before and len(after) > len(before)
    assert [row["epoch"] for row in after if row["val_top1"]] == ["1.0", "2.0"]
    assert contents(tmp_path / "version_1") == second and not (tmp_path / "version_2").exists()


def test_resume_of_a_path(shards, tmp_path):
    """last.ckpt of a folder of --output continues in that folder; any other checkpoint gets a new one."""
    assert train(shards, tmp_path / "out") == 0
    version = tmp_path / "out" / "version_0"
    shutil.copytree(version, tmp_path / "elsewhere")
    before = contents(version)
    assert train(shards, tmp_path / "out", f"--resume={tmp_path}/elsewhere", "--max-epochs=2") == 0
    assert train(shards, tmp_path / "out", f"--resume={version}/best.ckpt", "--max-epochs=2") == 0
    assert contents(version) == before
    for number in (1, 2):
        log = rows(tmp_path / "out" / f"version_{number}")
        assert [row["epoch"] for row in log if row["val_top1"]] == ["2.0"]
    assert train(shards, tmp_path / "out", f"--resume={version}", "--max-epochs=2") == 0
    assert [row["epoch"] for row in rows(version) if row["val_top1"]] == ["1.0", "2.0"]
    assert not (tmp_path / "out" / "version_3").exists()


def test_two_runs_that_start_at_once_do_not_share_a_folder(shards, tmp_path, capsys, monkeypatch):
    """The other run makes the folder after this one has chosen its name."""
    monkeypatch.setattr(script, "version_folder", lambda output, checkpoint: output / "version_0")
    (tmp_path / "version_0").mkdir()
    assert train(shards, tmp_path) == 1
    assert "version_0: File exists" in one_line(capsys) and not list((tmp_path / "version_0").iterdir())


def test_a_run_that_fails_early_leaves_no_folder(shards, tmp_path):
    assert train(shards, tmp_path / "out", "--precision=7") == 1
    assert train(shards, tmp_path / "out", "--weights=/nowhere") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("launcher", ["torchrun", "lightning"])
def test_two_ranks_write_one_folder(unique, tmp_path, launcher):
    """Beside an earlier run's, and then resumed, as torchrun starts the ranks and as Lightning does."""
    flags = [f"--shards={unique}", f"--output={tmp_path}/out"]
    (tmp_path / "out" / "version_4").mkdir(parents=True)
    for number, more in enumerate((["--max-epochs=1"], ["--resume", "--max-epochs=2"])):
        if launcher == "torchrun":
            run = record(tmp_path / f"run-{number}", *flags, *more, ranks=2, workers="0")
        else:
            run = record(tmp_path / f"run-{number}", *flags, *more, "--devices=2", workers="0")
        assert run.returncode == 0, run.stderr[-2000:]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["version_4", "version_5"]
    assert not list((tmp_path / "out" / "version_4").iterdir())
    files = {path.name for path in (tmp_path / "out" / "version_5").iterdir()}
    assert {"last.ckpt", "best.ckpt", "metrics.csv", "metrics.json", "model.pt"} <= files
    assert [row["epoch"] for row in rows(tmp_path / "out" / "version_5") if row["val_top1"]] == ["1.0", "2.0"]
    assert (tmp_path / "run-1" / "rank-1.jsonl").exists()


def test_the_best_epoch_is_exported(shards, tmp_path):
    """As a plain state dict for torchvision, with what its validation gave."""
    import torchvision

    assert train(shards, tmp_path, "--max-epochs=3", "--lr=0.01") == 0
    version = tmp_path / "version_0"
    metrics = json.loads((version / "metrics.json").read_text())
    measured = [row for row in rows(version) if row["val_top1"]]
    best = max(measured, key=lambda row: float(row["val_top1"]))
    assert metrics["epoch"] == float(best["epoch"]) and metrics["step"] == 15 * metrics["epoch"]
    assert {name: metrics[name] for name in ("val_top1", "val_top5", "val_loss")} == pytest.approx(
        {name: float(best[name]) for name in ("val_top1", "val_top5", "val_loss")})
    assert (metrics["model"], metrics["val_size"], metrics["val_resize"]) == ("tiny", 32, 36)
    model = torchvision.models.get_model("tiny", num_classes=10)
    model.load_state_dict(torch.load(version / "model.pt", weights_only=True))
    kept = torch.load(version / "best.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, kept[f"model.{key}"]) for key, value in model.state_dict().items())
