"""imagenet_shards.py under faults: real kills, failing and stalled commands, several runs at once, unreadable input."""

import contextlib
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import PIL
import pytest
from conftest import convert, forked
from faults import small_disk
from PIL import Image
from sharding import everything, storing

import imagenet_shards as script

SCRIPT = Path(script.__file__)
HERE = script.Target(".", Path("."), 0, 1)
KILLS = int(os.environ.get("KILLS", 4))  # of each kind; 20 take about a minute


def start(*flags: str, **options) -> subprocess.Popen:
    """imagenet_shards.py in a process and a process group of its own."""
    command = [sys.executable, SCRIPT, "--maxcount=7", "--workers=2", *flags]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **options)


def wait_for(condition: Callable[[], object]) -> None:
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("the condition was not met within a minute")


def children(process: int) -> list[int]:
    """The workers of a process: its children that are Python."""
    found = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(pid) for pid in found if "python" in os.readlink(f"/proc/{pid}/exe")]


@pytest.fixture
def store(tmp_path) -> Path:
    """What stands for a bucket: a folder that a command writes to, a file at a time."""
    (tmp_path / "store").mkdir()
    return tmp_path / "store"


def stalling(store: Path, name: str) -> str:
    """A command that stores as gsutil does, but does not read the file of this name to its end."""
    return f"case %s in {name}) head -c 1000 >{store}/stalled; sleep 600; esac; {storing(store)}"


# ---------------------------------------------------------------- kills


def believed(folder: Path, reference: Path) -> None:
    """No index that a reader would accept unless every shard is complete; no shard under its name that is not."""
    for path in folder.glob("imagenet-*-*.tar"):
        assert path.read_bytes() == (reference / path.name).read_bytes(), path
    for split in ("train", "val"):
        index = folder / f"imagenet-{split}.json"
        content = json.loads(index.read_text()) if index.exists() else {}
        if content.get("__kind__", script.UNFINISHED) != script.UNFINISHED:
            assert all((folder / shard["url"]).exists() for shard in content["shardlist"])


def clear(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder)
        folder.mkdir()


def run_apart(tree: Path, shards: str, record: list[str]) -> None:
    forked()
    os._exit(convert(tree, shards, "--maxcount=2", *record))


@pytest.mark.parametrize("victim", ["main process", "worker"])
@pytest.mark.parametrize("target", ["folder", "command"])
def test_sigkill_at_random_moments_then_the_same_bytes(tree, tmp_path, store, target, victim):
    assert convert(tree, tmp_path / "undisturbed", "--maxcount=2") == 0
    shards, record = (store, []) if target == "folder" else (f"pipe:{storing(store)}", [f"--record={tmp_path}"])
    begun = time.monotonic()
    assert convert(tree, shards, "--maxcount=2", *record) == 0
    duration = time.monotonic() - begun
    clear(store, *tmp_path.glob("imagenet-shards-*"))
    kills, rng = 0, random.Random(f"{target} {victim}")
    for _ in range(20 * KILLS):
        process = multiprocessing.get_context("fork").Process(target=run_apart, args=(tree, shards, record))
        process.start()
        time.sleep(rng.uniform(0, duration))
        if victim == "main process":
            process.kill()  # its workers notice by themselves
            process.join()
            kills += process.exitcode == -signal.SIGKILL
        else:
            with contextlib.suppress(OSError, IndexError):  # it may end first
                os.kill(rng.choice(children(process.pid)), signal.SIGKILL)
            process.join()
            kills += process.exitcode == 1
        believed(store, tmp_path / "undisturbed")
        if process.exitcode == 0:  # finished: begin again
            clear(store, *tmp_path.glob("imagenet-shards-*"))
        if kills == KILLS:
            break
    assert kills == KILLS
    assert convert(tree, shards, "--maxcount=2", *record) == 0
    found = {name: digest for name, digest in everything(store).items() if not name.startswith("part-")}
    assert found == everything(tmp_path / "undisturbed") and not list(tmp_path.rglob("*.tmp-*"))


def test_a_killed_worker_stores_no_truncated_file(tree, shards, store, tmp_path):
    """Fault 3: the command of a killed worker must not take that for the end of the file."""
    slow = f"(head -c 2000; sleep 1; cat) > {store}/part-%s && mv {store}/part-%s {store}/%s"
    process = start(f"--imagenet={tree}", f"--shards=pipe:{slow}", f"--record={tmp_path}", "--workers=3", "--retries=0")
    wait_for(lambda: len(list(store.glob("part-imagenet-train-00*.tar"))) == 3)
    os.kill(children(process.pid)[1], signal.SIGKILL)
    _, error = process.communicate()
    assert process.returncode == 1 and "a worker process was killed" in error and error.count("\n") == 1
    time.sleep(1.5)  # longer than the commands would have waited
    believed(store, shards)


def test_an_old_index_never_vouches_for_other_shards(tree, store, tmp_path):
    """Faults 1 and 12: another record, other arguments, and a kill in the middle; also _info.json is up to date."""
    old, new = ([f"--imagenet={tree}", f"--record={tmp_path}/{name}"] for name in ("old", "new"))
    assert start(*old, f"--shards=pipe:{storing(store)}").wait() == 0
    before = everything(store)
    process = start(*new, "--seed=1", f"--shards=pipe:{stalling(store, '*train-000003.tar')}")
    wait_for(lambda: everything(store).get("imagenet-train-000001.tar") != before["imagenet-train-000001.tar"])
    process.kill()
    process.wait()
    assert json.loads((store / "imagenet-train.json").read_text())["__kind__"] == script.UNFINISHED
    assert "train" not in json.loads((store / "_info.json").read_text())["splits"]
    assert script.main(["--verify", f"--shards={store}", "--splits=train"]) == 1


def test_overwrite_replaces_the_index_first(tree, shards, tmp_path, monkeypatch):
    folder = shutil.copytree(shards, tmp_path / "data")

    def stop(*arguments: object) -> None:
        assert json.loads((folder / "imagenet-train.json").read_text())["__kind__"] == script.UNFINISHED
        assert json.loads((folder / "_info.json").read_text())["splits"].keys() == {"validation"}
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "write_shards", stop)
    assert convert(tree, folder, "--maxcount=7", "--seed=1", "--splits=train", "--overwrite") == 130


def test_overwrite_replaces_the_index_before_it_deletes_shards(tree, shards, tmp_path, capsys):
    """It stops at a surplus shard that can't be deleted; the same command then deletes the rest."""
    folder = shutil.copytree(shards, tmp_path / "data")
    flags = ["--maxcount=30", "--splits=train", "--overwrite"]
    surplus = folder / "imagenet-train-000008.tar"
    surplus.unlink()
    surplus.mkdir()
    assert convert(tree, folder, *flags) == 1
    assert f"{surplus}: Is a directory" in capsys.readouterr().err
    assert json.loads((folder / "imagenet-train.json").read_text())["__kind__"] == script.UNFINISHED
    surplus.rmdir()
    surplus.write_bytes(b"of the conversion before")
    assert convert(tree, folder, *flags) == 0
    assert len(list(folder.glob("imagenet-train-*.tar"))) == 2
    assert script.main(["--verify", f"--shards={folder}", "--splits=train"]) == 0


def test_a_killed_main_process_ends_its_commands(tree, store, tmp_path):
    command = f"case %s in *.tar) echo $$ >{store}/pid; sleep 600; esac; {storing(store)}"
    process = start(f"--imagenet={tree}", f"--shards=pipe:{command}", f"--record={tmp_path}")
    wait_for(lambda: (store / "pid").exists() and (store / "pid").read_text())
    process.kill()
    process.communicate()  # until no process can write to its standard error
    status = Path("/proc", (store / "pid").read_text().strip(), "cmdline")
    wait_for(lambda: not status.exists() or not status.read_bytes())  # it may stay a zombie


# ---------------------------------------------------------------- restarts


def test_after_skip_bad_a_rerun_without_it_keeps_everything(tree, tmp_path, capsys):
    """Fault 2."""
    copy, out = shutil.copytree(tree, tmp_path / "imagenet"), tmp_path / "out"
    sorted((copy / "train").rglob("*.JPEG"))[10].write_bytes(b"")
    assert convert(copy, out, "--maxcount=7") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "rerun with --skip-bad" in error and "fix them and rerun with --overwrite (starts over)" in error
    assert convert(copy, out, "--maxcount=7", "--skip-bad") == 0
    before = {path: path.stat().st_ino for path in out.glob("*.tar")}
    assert convert(copy, out, "--maxcount=7") == 0
    valid = next(path for path in sorted(before) if path.name.startswith("imagenet-val"))
    valid.unlink()
    assert convert(copy, out, "--maxcount=7") == 0
    assert all(path.stat().st_ino == inode for path, inode in before.items() if path != valid)
    sorted((copy / "train").rglob("*.JPEG"))[10].unlink()  # fixed: starts over
    assert convert(copy, out, "--maxcount=7") == 1 and "another recipe" in capsys.readouterr().err
    assert convert(copy, out, "--maxcount=7", "--overwrite") == 0
    assert convert(copy, tmp_path / "fresh", "--maxcount=7") == 0
    assert everything(out) == everything(tmp_path / "fresh")


def test_overwrite_keeps_what_has_this_recipe(tree, shards, tmp_path, capsys):
    """Fault 6: --overwrite, interrupted, and the same command again."""
    folder = shutil.copytree(shards, tmp_path / "data")
    flags = ["--maxcount=11", "--overwrite"]  # fewer shards than before
    assert convert(tree, folder, *flags, "--part=1/2") == 0
    before = {path: path.stat().st_ino for path in folder.glob("imagenet-*-00000[02].tar")}
    capsys.readouterr()
    assert convert(tree, folder, *flags) == 0
    assert "# train: keeping 3 of 6 shards" in capsys.readouterr().out
    assert all(path.stat().st_ino == inode for path, inode in before.items())
    assert convert(tree, tmp_path / "fresh", "--maxcount=11") == 0
    assert everything(folder) == everything(tmp_path / "fresh")


def test_a_shard_that_disappears_is_an_error(tree, tmp_path, capsys):
    """Fault 10."""
    out, first = tmp_path / "out", script.Target(str(tmp_path / "out"), tmp_path / "out", 0, 1)

    def remove() -> None:
        wait_for(first.record_path("imagenet-train-000000.tar").exists)
        (out / "imagenet-train-000000.tar").unlink()

    thread = threading.Thread(target=remove)
    thread.start()
    status = convert(tree, out, "--maxcount=1", "--workers=1")
    thread.join()
    assert status == 1 and "imagenet-train-000000.tar was removed or changed" in capsys.readouterr().err
    assert json.loads((out / "imagenet-train.json").read_text())["__kind__"] == script.UNFINISHED


# ---------------------------------------------------------------- several runs at once


@pytest.mark.parametrize("parts", [["1/2", "2/2"], ["1/1", "1/1"]])
def test_runs_at_the_same_time_in_one_folder(tree, shards, tmp_path, parts):
    """Fault 7: two parts, or twice the same run."""
    runs = [start(f"--imagenet={tree}", f"--shards={tmp_path}", f"--part={part}") for part in parts]
    assert [run.communicate()[1] for run in runs] == ["", ""]
    assert [run.returncode for run in runs] == [0, 0]
    assert everything(tmp_path) == everything(shards)


def test_a_run_leaves_the_temporary_files_of_others_alone(tree, tmp_path):
    """Fault 7: whose shards it does not write. It removes those of a killed run of its own files, the index too."""
    (tmp_path / ".finished").mkdir()
    written = ["imagenet-val.json", "_info.json", "imagenet-val-000001.tar", ".finished/imagenet-val-000001.tar.json"]
    for name in [*written, "imagenet-train-000099.tar"]:
        (tmp_path / f"{name}.tmp-123").write_bytes(b"another run's")
    assert convert(tree, tmp_path, "--maxcount=7", "--splits=val") == 0
    assert [path.name for path in tmp_path.rglob("*.tmp-*")] == ["imagenet-train-000099.tar.tmp-123"]


def test_another_run_may_finish_the_same_shard_first(tmp_path):
    with script.open_writer(HERE, f"{tmp_path}/x.tar") as file:
        file.write(b"the same")
        (tmp_path / "x.tar").write_bytes(b"the same")
        next(tmp_path.glob("x.tar.tmp-*")).unlink()
    assert (tmp_path / "x.tar").read_bytes() == b"the same"
    with pytest.raises(FileNotFoundError), script.open_writer(HERE, f"{tmp_path}/y.tar") as file:
        next(tmp_path.glob("y.tar.tmp-*")).unlink()


def test_no_two_writers_share_a_temporary_file(tmp_path):
    """Fault 7: not even with the same process id, as on two machines or in two containers."""
    with script.open_writer(HERE, f"{tmp_path}/x") as one, script.open_writer(HERE, f"{tmp_path}/x") as two:
        one.write(b"the same")
        two.write(b"the same")
        assert len(list(tmp_path.iterdir())) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.long
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_the_same_bytes_with_other_start_methods(tree, shards, tmp_path, method):
    flags = [f"--imagenet={tree}", f"--shards={tmp_path}", "--maxcount=7", "--workers=2", "--splits=val"]
    program = tmp_path / "program.py"  # these methods import the main module again
    program.write_text(
        "import multiprocessing, sys\n"
        f"sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
        "import imagenet_shards\n"
        "if __name__ == '__main__':\n"
        f"    multiprocessing.set_start_method({method!r})\n"
        "    sys.exit(imagenet_shards.main())\n"
    )
    subprocess.run([sys.executable, program, *flags], check=True, stdout=subprocess.DEVNULL)
    written = [path.name for path in tmp_path.glob("imagenet-val*")]
    assert len(written) == 6 and all((tmp_path / name).read_bytes() == (shards / name).read_bytes() for name in written)


# ---------------------------------------------------------------- commands that fail or stall


def test_a_failing_upload_is_retried(tree, shards, store, tmp_path, capfd):
    """Fault 4: every file fails at its first attempt; only that file is written again."""
    flaky = f"[ -e {tmp_path}/tried-%s ] || {{ touch {tmp_path}/tried-%s; echo 503 >&2; exit 1; }}; {storing(store)}"
    flags = [f"--record={tmp_path}", "--maxcount=20", "--splits=val"]
    assert convert(tree, f"pipe:{flaky}", *flags) == 0
    error = capfd.readouterr().err
    assert error.count("failed with exit status 1: 503; retry 1 of 5") == 4 and "Traceback" not in error
    assert convert(tree, tmp_path / "folder", "--maxcount=20", "--splits=val") == 0
    assert everything(store) == everything(tmp_path / "folder")
    order = Path(f"{store}.order").read_text().split()
    assert sorted(order) == sorted([*everything(store), "_info.json", "imagenet-val.json"])


def test_a_stalled_upload_times_out(tree, store, tmp_path, capfd):
    """Fault 5."""
    flags = [f"--record={tmp_path}", "--maxcount=20", "--splits=val", "--timeout=1", "--retries=1"]
    assert convert(tree, f"pipe:{stalling(store, '*000001.tar')}", *flags) == 1
    error = capfd.readouterr().err
    assert "no progress for 1 s; retry 1 of 1" in error and "no progress for 1 s; fix it and rerun" in error


def test_a_slow_upload_does_not_time_out(tmp_path):
    """It takes longer than the time limit, which is for the time without progress."""
    command = f"for part in 1 2 3 4; do head -c 1000; sleep 0.8; done >{tmp_path}/x"
    with script.open_writer(script.Target("", tmp_path, 0, 2), f"pipe:{command}") as file:
        file.write(bytes(4000))
    assert (tmp_path / "x").read_bytes() == bytes(4000)


def test_ctrl_c_ends_stalled_uploads(tree, store, tmp_path):
    """Fault 5: a real SIGINT to the foreground group, while a command sleeps for ten minutes."""
    process = start(
        f"--imagenet={tree}", f"--shards=pipe:{stalling(store, '*train*.tar')}", f"--record={tmp_path}",
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job inherits it ignored
    )  # fmt: skip
    wait_for((store / "stalled").exists)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and error == "imagenet_shards.py: interrupted; rerun the same command to resume\n"
    assert not list(store.glob("imagenet-*-*.tar"))


def test_a_worker_that_does_not_end_is_not_waited_for():
    """As one that waits for a lock which a killed worker held, or for a disk."""
    jobs = script.run_jobs(time.sleep, {"one": (0,), "other": (600,)}, 2)
    assert next(jobs)[0] == "one"
    begun = time.monotonic()
    jobs.close()
    assert time.monotonic() - begun < 60


def interrupt() -> str:
    os.kill(os.getppid(), signal.SIGINT)
    return "finished"


def test_ctrl_c_while_the_last_shard_ends_is_not_lost():
    """The shard's result is delivered, so that it can be recorded; then the run stops."""
    results = []
    with pytest.raises(KeyboardInterrupt):
        for _, future in script.run_jobs(interrupt, {0: ()}, 1):
            results.append(future.result())
    assert results == ["finished"]


def test_verify_of_a_stalled_command_times_out(shards, capsys):
    """Fault 11."""
    flags = ["--verify", "--timeout=1", "--retries=0", "--splits=train"]
    assert script.main([*flags, "--shards=pipe:sleep 600; true "]) == 1
    assert "no progress for 1 s" in capsys.readouterr().err
    stalled = f"pipe:case %s in *2.tar) head -c 2000 {shards}/%s; sleep 600; esac; cat {shards}/%s"
    assert script.main([*flags, f"--shards={stalled}"]) == 1
    error = capsys.readouterr().err
    assert "# problem: imagenet-train-000002.tar: " in error and "no progress for 1 s" in error


# ---------------------------------------------------------------- input that can't be used


def test_a_percent_sign_for_a_folder_is_refused_at_once(tree, tmp_path, capsys, monkeypatch):
    """Fault 8."""
    monkeypatch.chdir(tmp_path)
    assert convert(tree, "./data/%s") == 1
    assert "--shards=./data/%s: neither a folder nor pipe:COMMAND; name a folder, " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """A folder that everybody may write to, and a process to which permissions apply."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        try:
            os.geteuid() or os.seteuid(65534)
            yield Path(name)
        finally:
            os.getuid() or os.seteuid(0)


def make_images(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.frombytes("RGB", (20, 20), random.Random(path).randbytes(1200)).save(root / path, "JPEG")


def test_an_unreadable_folder_is_an_error(unprivileged, capsys):
    """Fault 9: a sub-folder of a class."""
    make_images(unprivileged / "tree", "train/a/1.jpg", "train/a/sub/2.jpg")
    (unprivileged / "tree/train/a/sub").chmod(0)
    assert convert(unprivileged / "tree", unprivileged / "out", "--splits=train") == 1
    error = capsys.readouterr().err
    assert f"{unprivileged}/tree/train/a/sub: Permission denied" in error and error.count("\n") == 1
    (unprivileged / "tree/train/a/sub").chmod(0o700)


def test_an_unreadable_image_is_named(unprivileged, capsys):
    """Fault 11: not the shard."""
    make_images(unprivileged / "tree", "train/a/1.jpg", "train/a/2.jpg")
    (unprivileged / "tree/train/a/2.jpg").chmod(0)
    assert convert(unprivileged / "tree", unprivileged / "out", "--splits=train") == 1
    error = capsys.readouterr().err
    assert f"{unprivileged}/tree/train/a/2.jpg: Permission denied" in error and error.count("\n") == 1


def test_a_tilde_is_expanded_everywhere(tree, tmp_path, monkeypatch):
    """Fault 11."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert convert(tree, "~/data", "--maxcount=70") == 0
    assert script.main(["--verify", "--shards=~/data"]) == 0
    assert script.main(["--index-only", "--shards=~/data"]) == 0


def test_a_class_name_that_is_not_utf8_is_refused(tmp_path, capsys):
    """Fault 11."""
    make_images(tmp_path, "train/a/1.jpg")
    os.rename(tmp_path / "train/a", os.fsencode(tmp_path) + b"/train/\xff")
    assert convert(tmp_path, tmp_path / "out", "--splits=train") == 1
    error = capsys.readouterr().err
    assert "class folder '\\udcff' has an unprintable name; rename it" in error and error.count("\n") == 1


def test_resize_keeps_the_brightness_of_16_bit_images():
    """Fault 11: a gradient does not become white."""
    levels = [value * 1024 for value in range(64)]
    buffer = io.BytesIO()
    Image.frombytes("I;16", (64, 64), struct.pack("<64H", *levels) * 64).save(buffer, "PNG")
    resized = Image.open(io.BytesIO(script.resize_image(buffer.getvalue(), 32, 95)))
    assert resized.mode == "L" and resized.getextrema()[0] < 10 and resized.getextrema()[1] > 245
    assert 120 < sum(resized.tobytes()) / 1024 < 135


def test_a_sparse_member_is_refused(shards, tmp_path, capsys):
    """Fault 11: it claims 3 GB."""
    folder = shutil.copytree(shards, tmp_path / "data")
    with open(tmp_path / "a.jpg", "wb") as file:
        file.truncate(3 << 30)
    shard = folder / "imagenet-train-000000.tar"
    subprocess.run(["tar", "--sparse", "-C", tmp_path, "-cf", shard, "a.jpg"], check=True)
    assert shard.stat().st_size < 1e6
    assert script.main(["--verify", f"--shards={folder}", "--splits=train"]) == 1
    assert "# problem: imagenet-train-000000.tar: a.jpg: not a regular file" in capsys.readouterr().err


def test_a_rename_is_followed_by_an_fsync_of_the_folder(tmp_path, monkeypatch):
    """Fault 12."""
    synced, fsync = [], os.fsync

    def record(descriptor: int) -> None:
        synced.append((stat.S_ISDIR(os.fstat(descriptor).st_mode), (tmp_path / "x").exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    with script.open_writer(HERE, f"{tmp_path}/x") as file:
        file.write(b"x")
    assert synced == [(False, False), (True, True)]


def test_another_version_of_pillow_does_not_continue_a_resized_conversion(tree, tmp_path, capsys, monkeypatch):
    """Fault 12."""
    assert convert(tree, tmp_path, "--resize=32", "--splits=val", "--maxcount=7") == 0
    monkeypatch.setattr(PIL, "__version__", "1.2.3")
    assert convert(tree, tmp_path, "--resize=32", "--splits=val", "--maxcount=7") == 1
    assert "another recipe (resize [32, 90, 'Pillow " in capsys.readouterr().err


@pytest.mark.parametrize("flag, nearest", [("--imagnet=/x", "--imagenet"), ("--shard=/x", "--shards")])
def test_a_mistyped_flag_names_the_nearest_one(capsys, flag, nearest):
    with pytest.raises(SystemExit) as stop:
        script.main([flag])
    assert stop.value.code == 2
    assert f"unrecognized arguments: {flag}; did you mean {nearest}?" in capsys.readouterr().err


def test_disk_full_while_sharding(tree, tmp_path, capsys):
    disk = tmp_path / "disk"
    small_disk(disk, "size=300k")
    try:
        assert convert(tree, disk, "--maxcount=7") == 1
        error = capsys.readouterr().err
        assert "No space left on device" in error and error.count("\n") == 1
        assert not list(disk.glob("*.tmp*"))
        assert "not-finished" in (disk / "imagenet-train.json").read_text()
        assert os.system(f"mount -o remount,size=50m '{disk}'") == 0
        assert convert(tree, disk, "--maxcount=7") == 0
        assert convert(tree, tmp_path / "whole", "--maxcount=7") == 0
        assert everything(disk) == everything(tmp_path / "whole")
    finally:
        os.system(f"umount '{disk}'")


def test_ctrl_c_is_one_line(tree, tmp_path):
    """A real SIGINT to the whole foreground group, as a terminal sends it."""
    process = subprocess.Popen(
        [sys.executable, SCRIPT, f"--imagenet={tree}", f"--shards={tmp_path}", "--maxcount=1", "--workers=2"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background inherits it ignored
    )
    process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130 and error.startswith("imagenet_shards.py: interrupted") and error.count("\n") == 1
    assert not list(tmp_path.glob("*.tmp*"))
