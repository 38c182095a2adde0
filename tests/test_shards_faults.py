"""imagenet_shards.py under faults: real kills and signals, several runs at once, a full disk."""

import contextlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import convert, forked
from faults import descendants, ended, small_disk
from packed import everything

import imagenet_shards as script

SCRIPT = Path(script.__file__)
KILLS = int(os.environ.get("KILLS", 4))  # of each kind; 20 take about a minute


def start(*command: object, **options) -> subprocess.Popen:
    """Python with these arguments, in a process."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *map(str, command)], **pipes, **options)


def wait_for(condition: Callable[[], object]) -> None:
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("the condition was not met within a minute")


# ---------------------------------------------------------------- kills


def believed(folder: Path, *references: Path) -> None:
    """No shard under its name that is not complete, and no index unless all its shards are there."""
    for path in folder.glob("imagenet-*-*.tar"):
        assert path.read_bytes() in [(r / path.name).read_bytes() for r in references if (r / path.name).exists()]
    for path in folder.glob("imagenet-*.json"):
        [reference] = [r for r in references if (r / path.name).read_bytes() == path.read_bytes()]
        for shard in json.loads(path.read_text())["shardlist"]:
            assert (folder / shard["url"]).read_bytes() == (reference / shard["url"]).read_bytes()


def run_apart(tree: Path, folder: Path, flags: list[str]) -> None:
    forked()
    os.setsid()
    os._exit(convert(tree, folder, *flags))


@pytest.mark.parametrize("flags", [["--maxcount=2"], ["--maxcount=2", "--overwrite"]])
@pytest.mark.parametrize("victim", ["group", "main process", "worker"])
def test_sigkill_at_random_moments_then_the_same_bytes(tree, shards, tmp_path, capfd, victim, flags):
    """With --overwrite over a finished conversion of other arguments."""
    reference, folder = tmp_path / "undisturbed", tmp_path / "data"
    begun = time.monotonic()
    assert convert(tree, reference, "--maxcount=2") == 0
    duration = time.monotonic() - begun
    kills, rng = 0, random.Random(victim)
    for _ in range(20 * KILLS):
        if "--overwrite" in flags and not folder.exists():
            shutil.copytree(shards, folder)
        process = multiprocessing.get_context("fork").Process(target=run_apart, args=(tree, folder, flags))
        process.start()
        time.sleep(rng.uniform(0, duration))
        workers = descendants(process.pid)
        with contextlib.suppress(OSError, IndexError):  # it may end first
            if victim == "worker":
                os.kill(rng.choice(workers), signal.SIGKILL)
            else:
                (os.kill if victim == "main process" else os.killpg)(process.pid, signal.SIGKILL)
        process.join()
        assert ended(workers)
        kills += process.exitcode == (1 if victim == "worker" else -signal.SIGKILL)
        believed(folder, shards, reference)
        if process.exitcode == 0:  # finished: begin again
            shutil.rmtree(folder)
        if kills == KILLS:
            break
    assert kills == KILLS
    assert convert(tree, folder, *flags) == 0
    assert everything(folder) == everything(reference) and not list(folder.rglob("*.tmp"))
    error = capfd.readouterr().err.splitlines()
    assert all("a worker process was killed" in line for line in error), error


SLOW = """import os, runpy, sys, time, webdataset
write, sys.argv = webdataset.ShardWriter.write, sys.argv[1:]
def wait(*args):
    any(os.path.exists(os.environ["GO"]) or time.sleep(0.01) for _ in range(6000))
    return write(*args)
webdataset.ShardWriter.write = wait
runpy.run_path(sys.argv[0], run_name="__main__")"""


@pytest.mark.parametrize("number, ignored", [(signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGINT, True)])
def test_a_signal_ends_all_processes_at_once_and_silently(tree, shards, tmp_path, number, ignored):
    """SIGINT to the whole foreground group, as a terminal sends it; a script's background job ignores it."""
    flags = [f"--imagenet={tree}", f"--shards={tmp_path}/out", "--maxcount=7", "--workers=2"]
    process = start(
        "-c", SLOW, SCRIPT, *flags, start_new_session=True, env=os.environ | {"GO": f"{tmp_path}/go"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.SIG_DFL),
    )  # fmt: skip
    wait_for(lambda: len(list(tmp_path.glob("out/*.tar.tmp"))) == 2)
    workers = descendants(process.pid)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    if ignored:
        (tmp_path / "go").touch()
    assert process.communicate()[1] == "" and process.returncode == (0 if ignored else -number)
    assert ended(workers)
    assert convert(tree, tmp_path / "out", "--maxcount=7") == 0
    assert everything(tmp_path / "out") == everything(shards)


def test_ctrl_c_during_the_imports_is_silent():
    code = f"import runpy, sys, signal; signal.signal(2, signal.default_int_handler); sys.argv = ['x', '--help']\n" \
        f"class Stop:\n def find_spec(self, name, *args):\n  name == 'numpy' and __import__('os').kill(0, 2)\n" \
        f"sys.meta_path.insert(0, Stop()); runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"  # fmt: skip
    process = start("-c", code, start_new_session=True)
    assert process.communicate()[1] == "" and process.returncode == -signal.SIGINT


def test_a_worker_that_does_not_end_is_not_waited_for():
    """As one that waits for a lock which a killed worker held, or for a disk."""
    jobs = script.run_jobs(time.sleep, {"one": (0,), "other": (3600,)}, 2)
    assert next(jobs)[0] == "one"
    jobs.close()  # or the test's time is over


def test_lack_of_memory_is_not_an_invalid_image(tree, tmp_path, refused, monkeypatch):
    def fail(image: object) -> None:
        raise MemoryError

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    error = refused(f"--imagenet={tree}", f"--shards={tmp_path}/out", "--resize=20", "--skip-bad")
    assert "out of memory" in error and "--workers" in error
    assert not (tmp_path / "out/imagenet-train.json").exists()


# ---------------------------------------------------------------- restarts, several runs at once


def test_overwrite_deletes_the_index_before_any_shard(tree, shards, tmp_path, refused):
    """It stops at a shard that can't be deleted; the same command then deletes the rest."""
    folder = shutil.copytree(shards, tmp_path / "data")
    (folder / "imagenet-train-original.tar").write_bytes(b"of the user")
    flags = [f"--imagenet={tree}", f"--shards={folder}", "--maxcount=30", "--splits=train", "--overwrite"]
    surplus = folder / "imagenet-train-000000.tar"
    surplus.unlink()
    surplus.mkdir()
    assert f"{surplus}: Is a directory" in refused(*flags)
    assert not (folder / "imagenet-train.json").exists() and not (folder / "_info.json").exists()
    assert len(list(folder.glob("imagenet-train-0*.tar"))) == 9
    surplus.rmdir()
    surplus.write_bytes(b"of the conversion before")
    assert script.main(flags) == 0
    assert len(list(folder.glob("imagenet-train-0*.tar"))) == 2
    assert (folder / "imagenet-train-original.tar").read_bytes() == b"of the user"
    assert script.main(["--verify", f"--shards={folder}"]) == 0  # val is as it was


def test_overwrite_overwrites_and_a_rerun_without_it_resumes(copy, shards, tmp_path, capsys, monkeypatch):
    """A changed byte of the same size too; the same command again, without --overwrite, keeps what it finished."""
    folder, path = shutil.copytree(shards, tmp_path / "data"), sorted((copy / "train").rglob("*.JPEG"))[10]
    data = bytearray(path.read_bytes())
    data[-50] ^= 1
    path.write_bytes(data)
    write, written = script.write_file, []

    def stop_after_three(path: Path, data: bytes) -> None:
        write(path, data)
        written.append(path)
        if len(written) == 3:
            raise script.UserError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(script, "write_file", stop_after_three)
        assert convert(copy, folder, "--maxcount=7", "--overwrite", "--workers=1") == 1
    capsys.readouterr()
    assert convert(copy, folder, "--maxcount=7") == 0
    assert "# train: keeping 2 of 9 shards" in capsys.readouterr().out  # the third has a record, but no name yet
    assert convert(copy, tmp_path / "fresh", "--maxcount=7") == 0
    assert everything(folder) == everything(tmp_path / "fresh") != everything(shards)


def test_one_run_at_a_time_in_a_folder(tree, shards, tmp_path, refused):
    """Two starts at once: one writes, the other one is refused unless it comes late."""
    flags = [f"--imagenet={tree}", f"--shards={tmp_path}", "--maxcount=7"]
    runs = [start(SCRIPT, *flags) for _ in range(2)]
    errors = [run.communicate()[1] for run in runs]
    refusal = f"imagenet_shards.py: {tmp_path}/.finished: another run is writing there; wait for it, or end it\n"
    assert sorted(zip((run.returncode for run in runs), errors)) in ([(0, ""), (0, "")], [(0, ""), (1, refusal)])
    assert everything(tmp_path) == everything(shards)
    with script.lock_folder(tmp_path / ".finished"):
        assert "another run is writing there" in refused(*flags, "--overwrite")
    assert everything(tmp_path) == everything(shards) and script.main(flags) == 0


# ---------------------------------------------------------------- disks


def test_a_name_is_given_after_the_bytes_and_the_names_before_are_on_the_disk(tmp_path, monkeypatch):
    """So no power cut leaves a file that is cut short, or an index without its shards."""
    steps, fsync, replace = [], os.fsync, os.replace

    def record(descriptor: int) -> None:
        steps.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(os, "replace", lambda *paths: [steps.append("name"), replace(*paths)])
    script.write_file(tmp_path / "x", b"x")
    assert steps == ["file", "folder", "name"] and (tmp_path / "x").read_bytes() == b"x"


def test_a_full_disk(tree, tmp_path, refused):
    """Noticed before anything is written where the plan knows the sizes; with --resize while writing."""
    disk, flags = tmp_path / "disk", ["--maxcount=7", "--resize=110"]
    assert convert(tree, tmp_path / "whole", *flags) == 0
    small_disk(disk, "size=20k")
    try:
        error = refused(f"--imagenet={tree}", f"--shards={disk}", "--maxcount=7")
        assert re.search(rf"{disk}: 2\.\d MB are needed, 0\.0 MB are free", error)
        assert [path.name for path in disk.iterdir()] == [".finished"]
        finished = []
        for size in (20, 300, 700):  # in KB; the first is too small for one shard
            assert os.system(f"mount -o remount,size={size}k '{disk}'") == 0
            run = start(SCRIPT, f"--imagenet={tree}", f"--shards={disk}", *flags)
            error = run.communicate()[1]  # of its end too, where Python may print "Exception ignored"
            assert run.returncode == 1 and error.count("\n") == 1, error
            assert f"imagenet_shards.py: {disk}/" in error and "No space left on device" in error
            assert set(finished) <= set(finished := [(path, path.stat().st_ino) for path in disk.glob("*.tar")])
            believed(disk, tmp_path / "whole")
        assert finished and os.system(f"mount -o remount,size=50m '{disk}'") == 0
        assert convert(tree, disk, *flags) == 0
        assert everything(disk) == everything(tmp_path / "whole")
        (disk / "imagenet-train-000003.tar.tmp").write_bytes(bytes(51_000_000))  # as a killed run leaves it
        assert convert(tree, disk, "--maxcount=7", "--overwrite") == 0
    finally:
        os.system(f"umount '{disk}'")
