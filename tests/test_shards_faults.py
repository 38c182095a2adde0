"""imagenet_shards.py under faults: real kills, several runs at once, a full disk, unreadable input."""

import contextlib
import io
import json
import multiprocessing
import os
import random
import re
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
from packed import everything
from PIL import Image

import imagenet_shards as script

SCRIPT = Path(script.__file__)
KILLS = int(os.environ.get("KILLS", 4))  # of each kind; 20 take about a minute


def start(*flags: str, **options) -> subprocess.Popen:
    """imagenet_shards.py in a process and a process group of its own."""
    command = [sys.executable, SCRIPT, "--workers=2", *flags]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **options)


def wait_for(condition: Callable[[], object]) -> None:
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("the condition was not met within a minute")


def children(process: int) -> list[int]:
    """The workers of a process."""
    with contextlib.suppress(OSError):  # it may have ended
        return list(map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split()))
    return []


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


def run_apart(tree: Path, folder: Path) -> None:
    forked()
    os._exit(convert(tree, folder, "--maxcount=2"))


@pytest.mark.parametrize("victim", ["main process", "worker"])
def test_sigkill_at_random_moments_then_the_same_bytes(tree, tmp_path, victim):
    reference, folder = tmp_path / "undisturbed", tmp_path / "data"
    begun = time.monotonic()
    assert convert(tree, reference, "--maxcount=2") == 0
    duration = time.monotonic() - begun
    kills, rng = 0, random.Random(victim)
    for _ in range(20 * KILLS):
        process = multiprocessing.get_context("fork").Process(target=run_apart, args=(tree, folder))
        process.start()
        time.sleep(rng.uniform(0, duration))
        workers = children(process.pid)
        if victim == "main process":
            process.kill()  # its workers notice by themselves
            process.join()
            kills += process.exitcode == -signal.SIGKILL
        else:
            with contextlib.suppress(OSError, IndexError):  # it may end first
                os.kill(rng.choice(workers), signal.SIGKILL)
            process.join()
            kills += process.exitcode == 1
        wait_for(lambda pids=workers: not any(map(is_running, pids)))
        believed(folder, reference)
        if process.exitcode == 0:  # finished: begin again
            shutil.rmtree(folder)
        if kills == KILLS:
            break
    assert kills == KILLS
    assert convert(tree, folder, "--maxcount=2") == 0
    assert everything(folder) == everything(reference) and not list(folder.rglob("*.tmp-*"))


def is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie, which a container may keep."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def large_tree(root: Path) -> Path:
    """A tree whose two shards take seconds to write."""
    for n in range(2):
        (root / f"train/n{n}").mkdir(parents=True)
        with open(root / f"train/n{n}/{n}.jpg", "wb") as file:
            file.write(b"\xff\xd8\xff" + bytes(1000) + b"\xff\xd9")
        os.mkfifo(root / f"train/n{n}/wait.jpg")  # reading it never ends
    return root


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_all_processes_with_a_line(tmp_path, number, status):
    """SIGINT to the whole foreground group, as a terminal sends it. The next run removes the temporary files."""
    tree, out = large_tree(tmp_path / "tree"), tmp_path / "out"
    process = start(
        f"--imagenet={tree}", f"--shards={out}", "--splits=train", "--maxcount=1", start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job inherits it ignored
    )
    wait_for(lambda: list(out.glob("*.tar.tmp-*")))
    workers = children(process.pid)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == status
    assert error == f"imagenet_shards.py: {number.name}: rerun the same command to resume; finished shards are kept\n"
    wait_for(lambda: not any(map(is_running, workers)))
    (out / "imagenet-train-000000.tar.tmp-0123456789ab").touch()  # as a worker that was killed may leave it
    for path in tree.rglob("wait.jpg"):
        path.unlink()
    assert convert(tree, out, "--splits=train", "--seed=1") == 1  # refused: another recipe
    assert not list(out.glob("*.tmp-*"))


def test_overwrite_replaces_the_index_first(tree, shards, tmp_path, monkeypatch):
    folder = shutil.copytree(shards, tmp_path / "data")

    def stop(*arguments: object) -> None:
        assert json.loads((folder / "imagenet-train.json").read_text())["__kind__"] == script.UNFINISHED
        assert json.loads((folder / "_info.json").read_text())["splits"].keys() == {"validation"}
        raise script.UserError("stopped")

    monkeypatch.setattr(script, "write_shards", stop)
    assert convert(tree, folder, "--maxcount=7", "--seed=1", "--splits=train", "--overwrite") == 1


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


# ---------------------------------------------------------------- restarts


def test_what_was_skipped_is_read_again_without_skip_bad(tree, tmp_path, capsys):
    """A damaged image of the same size, which is then restored: shards with it are written anew, others are kept."""
    copy, out = shutil.copytree(tree, tmp_path / "imagenet"), tmp_path / "out"
    path = sorted((copy / "train").rglob("*.JPEG"))[10]
    original = path.read_bytes()
    path.write_bytes(bytes(len(original)))
    assert convert(copy, out, "--maxcount=7", "--skip-bad") == 0
    before = {path: path.stat().st_ino for path in out.glob("*.tar")}
    path.write_bytes(original)
    assert convert(copy, out, "--maxcount=7") == 0
    assert sum(path.stat().st_ino != inode for path, inode in before.items()) == 1
    assert convert(copy, tmp_path / "fresh", "--maxcount=7") == 0
    assert everything(out) == everything(tmp_path / "fresh")


def test_overwrite_overwrites_and_a_rerun_without_it_resumes(tree, shards, tmp_path, capsys, monkeypatch):
    """A changed byte of the same size too; the same command again, without --overwrite, keeps what it finished."""
    copy, folder = shutil.copytree(tree, tmp_path / "imagenet"), shutil.copytree(shards, tmp_path / "data")
    (folder / "imagenet-train-original.tar").write_bytes(b"of the user")
    path = sorted((copy / "train").rglob("*.JPEG"))[10]
    data = bytearray(path.read_bytes())
    data[-50] ^= 1
    path.write_bytes(data)
    write, written = script.store, []

    def stop_after_three(path: Path, text: str) -> None:
        write(path, text)
        written.extend([path] * (path.parent.name == script.RECORDS))
        if len(written) == 3:
            raise script.UserError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(script, "store", stop_after_three)
        assert convert(copy, folder, "--maxcount=7", "--overwrite") == 1
    capsys.readouterr()
    assert convert(copy, folder, "--maxcount=7") == 0
    assert "# train: keeping 3 of 9 shards" in capsys.readouterr().out
    assert (folder / "imagenet-train-original.tar").read_bytes() == b"of the user"
    (folder / "imagenet-train-original.tar").unlink()
    assert convert(copy, tmp_path / "fresh", "--maxcount=7") == 0
    assert everything(folder) == everything(tmp_path / "fresh") != everything(shards)


def test_a_shard_that_disappears_is_an_error(tree, tmp_path, capsys):
    """Fault 10."""
    out = tmp_path / "out"

    def remove() -> None:
        wait_for((out / script.RECORDS / "imagenet-train-000000.tar.json").exists)
        (out / "imagenet-train-000000.tar").unlink()

    thread = threading.Thread(target=remove)
    thread.start()
    status = convert(tree, out, "--maxcount=1", "--workers=1")
    thread.join()
    assert status == 1 and "imagenet-train-000000.tar was removed or changed" in capsys.readouterr().err
    assert json.loads((out / "imagenet-train.json").read_text())["__kind__"] == script.UNFINISHED


# ---------------------------------------------------------------- several runs at once


def test_runs_at_the_same_time_in_one_folder(tree, shards, tmp_path):
    """Fault 7: twice the same run."""
    runs = [start(f"--imagenet={tree}", f"--shards={tmp_path}", "--maxcount=7") for _ in range(2)]
    assert [run.communicate()[1] for run in runs] == ["", ""]
    assert [run.returncode for run in runs] == [0, 0]
    assert everything(tmp_path) == everything(shards)


def test_a_run_removes_the_temporary_files_of_dead_processes_only(tree, tmp_path):
    (tmp_path / ".finished").mkdir()
    names = ["imagenet-val.json", "_info.json", "imagenet-train-000099.tar", ".finished/imagenet-val-000001.tar.json"]
    for name in names:
        (tmp_path / f"{name}.tmp-0123456789ab").write_bytes(b"of a killed run")
    (tmp_path / "notes.tmp-1").write_bytes(b"of the user")
    with script.open_writer(tmp_path / "imagenet-val-000001.tar"):  # of another run that writes
        assert convert(tree, tmp_path, "--maxcount=7", "--splits=val") == 0
        left = sorted(path.name[:27] for path in tmp_path.rglob("*.tmp-*"))
        assert left == ["imagenet-val-000001.tar.tmp", "notes.tmp-1"]


def test_no_two_writers_share_a_temporary_file(tmp_path):
    """Fault 7: not even with the same process id, as on two machines or in two containers."""
    with script.open_writer(tmp_path / "x") as one, script.open_writer(tmp_path / "x") as two:
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


def test_a_worker_that_does_not_end_is_not_waited_for():
    """As one that waits for a lock which a killed worker held, or for a disk."""
    jobs = script.run_jobs(time.sleep, {"one": (0,), "other": (600,)}, 2)
    assert next(jobs)[0] == "one"
    begun = time.monotonic()
    jobs.close()
    assert time.monotonic() - begun < 60


def test_verify_of_a_stalled_command_times_out(shards, capsys):
    """Fault 11."""
    flags = ["--verify", "--timeout=1", "--retry-for=0", "--splits=train"]
    assert script.main([*flags, "--shards=pipe:sleep 600; true "]) == 1
    assert "no byte for 1 s" in capsys.readouterr().err
    stalled = f"pipe:case %s in *2.tar) head -c 2000 {shards}/%s; sleep 600; esac; cat {shards}/%s"
    assert script.main([*flags, f"--shards={stalled}"]) == 1
    error = capsys.readouterr().err
    assert "problem: imagenet-train-000002.tar: no byte for 1 s" in error


# ---------------------------------------------------------------- input that can't be used


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
    assert "problem: imagenet-train-000000.tar: a.jpg: not a regular file" in capsys.readouterr().err


def test_a_rename_is_followed_by_an_fsync_of_the_folder(tmp_path, monkeypatch):
    """Fault 12."""
    synced, fsync = [], os.fsync

    def record(descriptor: int) -> None:
        synced.append((stat.S_ISDIR(os.fstat(descriptor).st_mode), (tmp_path / "x").exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    with script.open_writer(tmp_path / "x") as file:
        file.write(b"x")
    assert synced == [(False, False), (True, True)]


def test_another_version_of_pillow_does_not_continue_a_resized_conversion(tree, tmp_path, capsys, monkeypatch):
    """Fault 12."""
    assert convert(tree, tmp_path, "--resize=32", "--splits=val", "--maxcount=7") == 0
    monkeypatch.setattr(PIL, "__version__", "1.2.3")
    assert convert(tree, tmp_path, "--resize=32", "--splits=val", "--maxcount=7") == 1
    assert "another recipe (resize [32, 90, 'Pillow " in capsys.readouterr().err


def test_a_full_disk(tree, tmp_path, capsys):
    """Noticed before anything is written where the plan knows the sizes; with --resize while writing."""
    disk = tmp_path / "disk"
    small_disk(disk, "size=300k")
    try:
        assert convert(tree, disk, "--maxcount=7") == 1
        error = capsys.readouterr().err
        assert re.search(r"disk: 2\.\d MB are needed, 0\.3 MB are free", error) and error.count("\n") == 1
        assert [path.name for path in disk.iterdir()] == [".finished"]
        assert convert(tree, disk, "--maxcount=7", "--resize=110") == 1
        error = capsys.readouterr().err
        assert "No space left on device" in error and error.count("\n") == 1
        assert not list(disk.glob("*.tmp*"))
        assert "not-finished" in (disk / "imagenet-train.json").read_text()
        assert os.system(f"mount -o remount,size=50m '{disk}'") == 0
        assert convert(tree, disk, "--maxcount=7", "--resize=110") == 0
        assert convert(tree, tmp_path / "whole", "--maxcount=7", "--resize=110") == 0
        assert everything(disk) == everything(tmp_path / "whole")
    finally:
        os.system(f"umount '{disk}'")
