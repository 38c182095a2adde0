"""Nothing lost, nobody let in: every fault ends in exactly the right samples, once each, or in an error that names it."""

import gc
import io
import json
import multiprocessing
import os
import shutil
import tarfile
import time
from pathlib import Path

import faults
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_read import NAME, alive, expected, found, offsets, read_piece

import imagenet_train as script

CURLS = {"http": "{url}", "curl": "pipe:curl -s {url}", "curl -f": "pipe:curl -sf {url}%s"}


@pytest.fixture
def server(shards, monkeypatch):
    monkeypatch.setattr(script.time, "sleep", lambda seconds: None)
    with faults.fault_server(shards) as server:
        yield server


PLACES = ["nothing", "in the first header", "between members", "between cls and jpg", "in a header", "in an image",
          "in the last image", "in the last padding"]
FAULTS = {f"cut {place}": lambda o, p=place: faults.cut(o[p]) for place in PLACES}
FAULTS |= {f"cut {place}, exit status 0": lambda o, p=place: faults.cut(o[p], tell=False) for place in PLACES}
FAULTS |= {f"reset {place}": lambda o, p=place: faults.reset(o[p]) for place in ("nothing", "in a header", "in an image")}
FAULTS |= {f"stall {place}": lambda o, p=place: faults.stall(o[p]) for place in ("nothing", "in an image")}
FAULTS |= {
    "503": lambda o: faults.answer(503, "Service Temporarily Unavailable"),
    "429": lambda o: faults.answer(429, "Too Many Requests"),
    "a page with status 200": lambda o: faults.answer(200, "Please log in"),
    "a length too large": lambda o: faults.wrong_length(1000),
    "empty": lambda o: faults.other_bytes(lambda data: b""),
    "noise": lambda o: faults.other_bytes(lambda data: os.urandom(len(data))),
    "begun anew at the end": lambda o: faults.other_bytes(lambda data: data[: o["end"]] + data),
    "begun anew on the way": lambda o: faults.other_bytes(lambda data: data[: o["between members"]] + data),
}


def patience(name: str) -> float:
    """Seconds to wait for a byte: few where the test is that none comes."""
    return 2 if name.startswith("stall") else 60


def everywhere(shards: Path) -> dict[str, int]:
    members = tarfile.open(shards / NAME).getmembers()
    return offsets(shards / NAME) | {"end": members[-1].offset_data + -(-members[-1].size // 512) * 512}


@pytest.mark.parametrize("how", CURLS)
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_that_passes_costs_nothing(shards, server, name, how, capsys):
    """Twice the fault, then well: exactly the right samples, once each, of the whole shard and of a part of it."""
    index = script.read_index(CURLS[how].format(url=server.url), "train")
    for start, stop in ((0, 7), (2, 7)):
        server.faults[NAME] = [FAULTS[name](everywhere(shards)) for _ in range(2)]
        got = found(read_piece(index, script.Piece(1, start, stop), retries=2, timeout=patience(name)))
        assert got == expected(shards)[start:stop]
        assert not server.faults[NAME]  # both were met
    assert capsys.readouterr().err.count("; try ") == 4


@pytest.mark.parametrize("how", CURLS)
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_that_stays_is_named_after_the_right_samples(shards, server, name, how):
    index = script.read_index(CURLS[how].format(url=server.url), "train")
    server.faults[NAME] = [FAULTS[name](everywhere(shards)) for _ in range(20)]
    got = []
    with pytest.raises(script.TrainError, match=f"{NAME}: found .* of 7 samples") as error:
        for sample in read_piece(index, script.Piece(1, 0, 7), retries=1, timeout=patience(name)):
            got.append(sample)
    assert found(got) == expected(shards)[: len(got)]
    assert "\n" not in str(error.value) and "127.0.0.1" in str(error.value)


@pytest.mark.parametrize("how", CURLS)
def test_what_will_not_pass_is_not_waited_for(shards, server, how):
    index = script.read_index(CURLS[how].format(url=server.url), "train")
    server.requests.clear()
    for fault, said in ((faults.answer(404, "Not Found"), "404"), (faults.answer(403, "Forbidden"), "403")):
        if how == "curl -f":  # silent: that it was a 404 nobody can know
            said, tries = "exit status 22", 6
        else:
            tries = 1
        server.faults[NAME] = [fault] * 20
        with pytest.raises(script.TrainError, match=said):
            list(read_piece(index, script.Piece(1, 0, 7), retries=5))
        assert len(server.requests) == tries
        server.requests.clear()


@pytest.mark.parametrize("command", ["no-such-command %s", "cat /no/such/folder/%s", "sh -c 'exit 126' %s"])
def test_neither_are_commands_that_cannot_work(shards, monkeypatch, command):
    monkeypatch.setattr(script.time, "sleep", lambda seconds: seconds > 0.4 and pytest.fail("it waits"))
    index = script.read_index(str(shards), "train")._replace(prefix=f"pipe:{command}")
    with pytest.raises(script.PermanentError, match=NAME):
        list(read_piece(index, script.Piece(1, 0, 7), retries=5))


def test_a_server_that_changes_its_mind_is_an_error(shards, server):
    """Other samples than before, then the right ones: what was delivered can't be taken back, so it must not pass."""
    index = script.read_index(server.url, "train")
    server.faults[NAME] = [faults.other_bytes(lambda data: data[everywhere(shards)["between members"] :])]
    with pytest.raises(script.PermanentError, match=f"{NAME}: sample 1 is .* now, was .* at an earlier try"):
        list(read_piece(index, script.Piece(1, 0, 7), retries=2))


def test_the_pauses_grow_and_differ(shards, monkeypatch):
    pauses = []
    monkeypatch.setattr(script.time, "sleep", pauses.append)
    index = script.read_index(str(shards), "train")._replace(prefix="pipe:exit 5; echo %s")
    with pytest.raises(script.TrainError, match="exit status 5"):
        list(read_piece(index, script.Piece(1, 0, 7), retries=8))
    pauses = [pause for pause in pauses if pause > 0.4]  # the others are how subprocess waits
    assert len(pauses) == 8 and len(set(pauses)) == 8
    assert all(min(60, 2**n) / 2 <= pause <= min(60, 2**n) for n, pause in enumerate(pauses))


def test_the_index_is_tried_again_too(server):
    server.faults["imagenet-train.json"] = [faults.answer(503, "Busy"), faults.cut(100)]
    assert script.read_index(server.url, "train", retries=2).total == 60


@pytest.mark.parametrize("command", ["cat {f}/%s; sleep 100", "sleep 100; cat {f}/%s", "(head -c 9000; sleep 100) < {f}/%s"])
def test_a_command_that_stalls_is_ended(shards, tmp_path, command):
    command = f"echo $$ >{tmp_path}/pid; " + command.format(f=shards)
    index = script.read_index(str(shards), "train")._replace(prefix=f"pipe:{command}")
    begun = time.monotonic()
    with pytest.raises(script.TrainError, match=r"no byte came for 0\.3 s"):
        list(read_piece(index, script.Piece(1, 0, 7), timeout=0.3))
    assert time.monotonic() - begun < 50  # not the command's 100
    assert not alive(int((tmp_path / "pid").read_text()))


def test_a_slow_reader_is_not_a_stalled_command(shards):
    index = script.read_index(f"pipe:cat {shards}/", "train")
    got = []
    for sample in read_piece(index, script.Piece(1, 0, 7), timeout=2):
        time.sleep(0.4)
        got.append(sample)
    assert found(got) == expected(shards)


def test_nothing_is_left_behind_over_a_hundred_epochs(unique):
    """Neither processes nor descriptors, though most pieces end before their shard does."""
    index = script.read_index(f"pipe:cat {unique}/%s", "train")
    for workers, epochs in ((0, 100), (2, 5)):
        loader = script.Loader(script.LoaderConfig(index, True, 3, 32, world=5, rank=2, workers=workers))
        list(loader)
        gc.collect()  # what earlier tests left
        descriptors, processes = len(os.listdir("/proc/self/fd")), children()
        for _ in range(epochs):
            assert len(list(loader)) == len(loader)
        gc.collect()
        # Less than one an epoch: the test process itself opens and closes some meanwhile.
        assert len(os.listdir("/proc/self/fd")) < descriptors + epochs and children() < processes + epochs


def children() -> int:
    """This process's children, those included that only wait to be reaped."""
    return len(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


# ---------------------------------------------------------------- the cache


def epoch_of(index: script.Index, cache: Path, workers: int = 2) -> set[int]:
    loader = script.Loader(script.LoaderConfig(index, False, 5, 32, 36, workers=workers, cache=cache, retries=0))
    return {label for _, labels in loader for label in labels.tolist()} - {script.IGNORE_INDEX}


def test_a_shard_is_fetched_once(unique, tmp_path):
    with faults.fault_server(unique) as server:
        index = script.read_index(server.url, "val")
        server.requests.clear()
        assert epoch_of(index, tmp_path) == set(range(47))
        kept = {path.name.partition("-")[2]: path.read_bytes() for path in tmp_path.iterdir()}
        assert kept == {name: (unique / name).read_bytes() for name in index.names}
        server.requests.clear()
        assert epoch_of(index, tmp_path) == set(range(47))
        assert server.requests == []


def test_many_readers_of_one_shard(shards, tmp_path):
    """24 processes want all of 5 shards at once."""
    with faults.fault_server(shards) as server:
        index = script.read_index(server.url, "val")
        context = multiprocessing.get_context("fork")
        readers = [context.Process(target=epoch_of, args=(index, tmp_path, 3)) for _ in range(8)]
        [reader.start() for reader in readers]
        [reader.join() for reader in readers]
    assert [reader.exitcode for reader in readers] == [0] * 8
    kept = {path.name.partition("-")[2]: path.read_bytes() for path in tmp_path.iterdir()}
    assert kept == {name: (shards / name).read_bytes() for name in index.names}


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: b"\0" * len(data), lambda data: b""])
def test_a_copy_that_does_not_fit_the_index_is_fetched_again(shards, tmp_path, change, monkeypatch):
    monkeypatch.setattr(script.time, "sleep", lambda seconds: None)
    index = script.read_index(f"pipe:cat {shards}/", "train")
    read = lambda: found(read_piece(index, script.Piece(1, 0, 7), cache=tmp_path, retries=1))  # noqa: E731
    read()
    (copy,) = tmp_path.iterdir()
    copy.write_bytes(change(copy.read_bytes()))
    assert read() == expected(shards)
    assert copy.read_bytes() == (shards / NAME).read_bytes() and list(tmp_path.iterdir()) == [copy]


@pytest.mark.parametrize("name", ["cut in an image", "cut in an image, exit status 0", "reset in a header", "begun anew at the end"])
def test_a_download_that_fails_is_not_kept(shards, server, tmp_path, name):
    index = script.read_index(server.url, "train")
    server.faults[NAME] = [FAULTS[name](everywhere(shards))]
    with pytest.raises(script.TrainError):
        list(read_piece(index, script.Piece(1, 0, 7), cache=tmp_path))
    assert not list(tmp_path.iterdir())


def test_other_bytes_of_the_right_shape_are_not_kept(shards, server, tmp_path):
    index = script.read_index(server.url, "train")
    flip = everywhere(shards)["in an image"]
    server.faults[NAME] = [faults.other_bytes(lambda d: d[:flip] + bytes([d[flip] ^ 1]) + d[flip + 1 :])]
    assert len(list(read_piece(index, script.Piece(1, 0, 7), cache=tmp_path))) == 7
    assert not list(tmp_path.iterdir())


def small_disk(folder: Path, *options: str) -> None:
    folder.mkdir(exist_ok=True)
    if os.geteuid() or os.system(f"mount -t tmpfs -o {','.join(options)} none '{folder}'"):
        pytest.skip("needs the right to mount a small tmpfs")


@pytest.mark.parametrize("options", [["size=32k"], ["size=32k", "ro"]])
def test_a_full_or_read_only_cache_streams_on_with_one_warning(unique, tmp_path, options, capfd):
    disk = tmp_path / "disk"
    small_disk(disk, *options)
    try:
        index = script.read_index(f"pipe:cat {unique}/", "val")
        loader = script.Loader(script.LoaderConfig(index, False, 5, 32, 36, workers=3, cache=disk, retries=0))
        for _ in range(2):
            assert {x for _, labels in loader for x in labels.tolist()} - {script.IGNORE_INDEX} == set(range(47))
        assert capfd.readouterr().err.count("going on without") == 1
        assert not list(disk.glob("*.tmp-*"))
        assert all(path.stat().st_size == index.sizes[index.names.index(path.name.partition("-")[2])]
                   for path in disk.iterdir())
    finally:
        os.system(f"umount '{disk}'")


def test_a_cache_that_cannot_be_made_is_one_warning(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert script.make_cache(tmp_path / "file" / "cache") is None
    assert "going on without" in (error := capsys.readouterr().err) and error.count("\n") == 1


def test_what_killed_runs_left_in_the_cache_goes(tmp_path):
    old, new = tmp_path / "ab-x.tar.tmp-1-2", tmp_path / "ab-x.tar.tmp-3-4"
    [path.touch() for path in (old, new)]
    os.utime(old, (0, 0))
    assert script.make_cache(tmp_path) == tmp_path and list(tmp_path.iterdir()) == [new]


# ---------------------------------------------------------------- images that can't be decoded


@pytest.fixture
def blank(shards, tmp_path) -> Path:
    """The shards, with the bytes of 3 training images and of 1 validation image lost: sizes and headers are right."""
    folder = shutil.copytree(shards, tmp_path / "data")
    for name, places in ((NAME, (1, 3)), ("imagenet-train-000004.tar", (5,)), ("imagenet-val-000000.tar", ())):
        with open(folder / name, "r+b") as file:
            for place in places:
                member = tarfile.open(folder / name).getmembers()[place]
                file.seek(member.offset_data)
                file.write(bytes(member.size))
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_undecodable_images_are_left_out_counted_and_named(blank, workers, capsys):
    index = script.read_index(str(blank), "train")
    loader = script.Loader(script.LoaderConfig(index, True, 4, 32, workers=workers, max_bad=3))
    for _ in range(2):
        sizes = [len(labels) for images, labels in loader]
        assert len(sizes) == len(loader) == 15 and sum(sizes) == 57 and loader.bad == 3
        error = capsys.readouterr().err.splitlines()
        keys = [expected_key(blank, name, place) for name, place in ((NAME, 1), (NAME, 3), ("imagenet-train-000004.tar", 5))]
        assert sorted(line.split(": ")[1:3] for line in error) == sorted([f"left out {n}", key] for n, key in keys)
    with pytest.raises(script.TrainError, match="3 undecodable images in an epoch, 2 allowed; last imagenet-train"):
        list(script.Loader(script.LoaderConfig(index, True, 4, 32, workers=workers, max_bad=2)))


def expected_key(folder: Path, name: str, place: int) -> tuple[str, str]:
    return name, tarfile.open(folder / name).getmembers()[place].name.removesuffix(".jpg")


def test_the_epochs_end_reports_them_and_validation_allows_none(blank, tmp_path, capsys):
    from test_train import train

    assert train(blank, tmp_path / "out", "--max-bad=3") == 0
    assert "epoch 1: 3 images that can't be decoded were left out" in capsys.readouterr().out
    with open(blank / "imagenet-val-000000.tar", "r+b") as file:
        member = tarfile.open(blank / "imagenet-val-000000.tar").getmembers()[1]
        file.seek(member.offset_data)
        file.write(bytes(member.size))
    assert train(blank, tmp_path / "out2") == 1
    assert "1 undecodable images in an epoch, 0 allowed; last imagenet-val-000000.tar" in capsys.readouterr().err


# ---------------------------------------------------------------- hostile bytes


def ustar(*members: tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def test_a_member_that_claims_to_be_huge_is_refused():
    header = bytearray(ustar(("k.jpg", b"x"))[:512])
    header[124:136] = b"77777777777\0"  # 8 GiB
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 256 + sum(header[156:]))
    with pytest.raises(ValueError, match="a member of 8589934591 bytes"):
        list(script.tar_members(io.BytesIO(bytes(header)).read))


def test_an_endless_command_is_no_shard(shards, tmp_path):
    index = script.read_index(str(shards), "train")._replace(prefix=f"pipe:cat {shards}/%s /dev/zero")
    for how in ({}, {"cache": tmp_path}):
        with pytest.raises(script.TrainError, match=r"found 7 of 7 samples.* more than \d+ bytes"):
            list(read_piece(index, script.Piece(1, 0, 7), **how))
    assert not list(tmp_path.iterdir())


def test_an_endless_index_is_none(tmp_path):
    with pytest.raises(script.TrainError, match="more than 67108864 bytes"):
        script.read_index("pipe:cat /dev/zero; true ", "train")


def test_a_decompression_bomb_is_refused():
    buffer = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(buffer, "PNG")  # 0.1 MB that would be 2.7 GB
    index = script.Index("", ["n0"], [], [], [], [])
    sample = {"__key__": "k", "__shard__": "s.tar", "cls": b"0", "jpg": buffer.getvalue()}
    with pytest.raises(script.TrainError, match=r"s\.tar: k: .*pixels"):
        script.decode(sample, script.LoaderConfig(index, True, 1, 32), 0)


def test_pickles_are_bytes_like_any_other(tmp_path):
    """WebDataset's decoders would unpickle members with such names."""
    boom = b"cos\nsystem\n(S'touch " + str(tmp_path / "boom").encode() + b"'\ntR."
    data = ustar(("k.cls", b"0"), ("k.pyd", boom), ("k.pickle", boom), ("k.jpg", boom))
    (sample,) = script.tar_samples(io.BytesIO(data).read)
    index = script.Index("", ["n0"], [], [], [], [])
    with pytest.raises(script.TrainError):
        script.decode(sample | {"__shard__": "s"}, script.LoaderConfig(index, True, 1, 32), 0)
    assert not (tmp_path / "boom").exists()


def test_a_checkpoint_with_code_in_it_is_refused(shards, tmp_path, capsys):
    import torch
    from test_train import train

    class Boom:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/boom",)

    torch.save({"state_dict": {}, "boom": Boom()}, tmp_path / "evil.ckpt")
    assert train(shards, tmp_path / "out", f"--resume={tmp_path}/evil.ckpt") == 1
    assert "evil.ckpt: not a checkpoint of this program" in capsys.readouterr().err
    assert not (tmp_path / "boom").exists()


FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
VALID = ustar(("a.cls", b"0"), ("a.jpg", b"x" * 700), ("b.cls", b"1"), ("b.jpg", b"y" * 30))


@st.composite
def damaged(draw, data: bytes) -> bytes:
    """These bytes after up to five changes of a kind that disks and networks make, or an enemy."""
    data = bytearray(data)
    for _ in range(draw(st.integers(0, 5))):
        where = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.integers(0, 3)):
            case 0:
                data[where : where + 1] = draw(st.binary(min_size=1, max_size=1))
            case 1:
                del data[where:]
            case 2:
                data[where:where] = draw(st.binary(max_size=600))
            case 3:
                data[where : where + 12] = draw(st.from_regex(rb"[0-7 \x80\xff-]{12}", fullmatch=True))
    return bytes(data)


@FUZZ
@given(st.one_of(damaged(VALID), st.binary(max_size=2000)))
def test_fuzz_tar(data):
    try:
        for sample in script.tar_samples(io.BytesIO(data).read):
            assert {"__key__", "cls", "jpg"} <= set(sample)
    except ValueError as error:
        assert len(str(error)) < 500


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.sampled_from(["shardlist", "url", "nsamples", "filesize", "sha256", "classes"]), inner, max_size=6),
    max_leaves=12,
)
INDEX = json.dumps({"shardlist": [{"url": "a.tar", "nsamples": 1, "filesize": 9, "sha256": "a" * 64}], "classes": ["n"]})


@FUZZ
@given(data=st.one_of(damaged(INDEX.encode()), JSON.map(lambda value: json.dumps(value).encode()), st.binary(max_size=200)))
def test_fuzz_index(tmp_path, data):
    (tmp_path / "imagenet-train.json").write_bytes(data)
    try:
        index = script.read_index(str(tmp_path), "train")
        assert index.total > 0 and all("/" not in name for name in index.names)
    except script.TrainError as error:
        assert len(str(error)) < 600 and "\n" not in str(error)


def pictures() -> list[bytes]:
    found = []
    for form, options in (("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {})):
        Image.effect_noise((40, 30), 50).convert("RGB").save(buffer := io.BytesIO(), form, **options)
        found.append(buffer.getvalue())
    return found


PICTURES = pictures()


@FUZZ
@given(st.sampled_from(PICTURES).flatmap(damaged), st.booleans(), st.binary(max_size=4))
def test_fuzz_images(data, training, label):
    index = script.Index("", ["n0", "n1"], [], [], [], [])
    sample = {"__key__": "k", "__shard__": "s.tar", "cls": label or b"1", "jpg": data}
    try:
        pixels, number = script.decode(sample, script.LoaderConfig(index, training, 1, 32, 36), 0)
        assert pixels.shape == (32, 32, 3) and number in (0, 1)
    except script.TrainError as error:
        assert str(error).startswith("s.tar: k: ")
