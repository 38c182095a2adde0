"""Faulty servers and commands, in every way of reading: the right samples, once each, or an error that names them."""

import os

import faults
import pytest
from reading import NAME, at, expected, found, places, read_shard

import imagenet_shards as script
from imagenet_shards import Index, PermanentError, UserError, read_index

# How the shards are read: in ranges, and by two commands. The first has no -f: error pages are its output.
KINDS = {"ranges": "{url}", "curl": "pipe:curl -s {url}", "curl -f": "pipe:curl -sf {url}%s"}


@pytest.fixture
def server(blocks, monkeypatch):
    monkeypatch.setattr(script.random, "uniform", lambda low, high: 0)  # no pauses between retries
    with faults.fault_server(blocks) as server:
        yield server


def index_at(server, kind: str) -> Index:
    index = read_index(KINDS[kind].format(url=server.url), "train", timeout=20)
    assert index.seekable == (kind == "ranges")
    server.requests.clear()
    return index


def place(name: str) -> faults.Place:
    return lambda data: places(data)[name]


PLACES = ["at the start", "in the first header", "between samples", "between cls and jpg", "in a header", "in an image",
          "in the last padding"]
FAULTS = {f"cut {name}": faults.cut(place(name)) for name in PLACES}
FAULTS |= {f"cut {name}, exit status 0": faults.cut(place(name), tell=False) for name in PLACES}
FAULTS |= {f"reset {name}": faults.reset(place(name)) for name in ("at the start", "in a header", "in an image")}
FAULTS |= {f"stall {name}": faults.stall(place(name)) for name in ("at the start", "in an image")}
FAULTS |= {
    "503": faults.answer(503, "Service Temporarily Unavailable"),
    "429": faults.answer(429, "Too Many Requests"),
    "empty": faults.other_bytes(lambda data: b""),
    "noise": faults.other_bytes(lambda data: os.urandom(len(data))),
    "one flipped bit": faults.other_bytes(lambda data: data[:700] + bytes([data[700] ^ 1]) + data[701:]),
    "two blocks swapped": faults.other_bytes(lambda data: data[len(data) // 2 :] + data[: len(data) // 2]),
    "begun again within itself": faults.other_bytes(lambda data: data[: places(data)["between samples"]] + data),
}


def timeout(name: str) -> float:
    """Seconds to wait for a byte: few where the test is that none comes."""
    return 0.5 if name.startswith("stall") else 60


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_that_passes_costs_nothing(blocks, server, name, kind, capsys):
    """The fault twice, then good answers: exactly the right samples, once each."""
    index = index_at(server, kind)
    server.faults[NAME] = [FAULTS[name]] * 2
    assert found(read_shard(index, retry_for=60, timeout=timeout(name))) == expected(blocks)
    assert not server.faults[NAME] and capsys.readouterr().err.count("; next try in") == 2  # both were met


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_that_stays_is_named_after_the_right_samples(blocks, server, name, kind):
    index, got = index_at(server, kind), []
    server.faults[NAME] = [FAULTS[name]] * 40
    with pytest.raises(UserError, match=f"{NAME}.*: ") as error:
        for sample in read_shard(index, timeout=timeout(name)):
            got.append(sample)
    assert found(got) == expected(blocks)[: len(got)]
    assert "\n" not in str(error.value) and len(str(error.value)) < 700 and "127.0.0.1" in str(error.value)


SAID = {
    ("ranges", "503"): "503", ("ranges", "stall in an image"): "no answer within 0.5 s",
    ("ranges", "one flipped bit"): ", 3 samples at byte .*CRC-32 [0-9a-f]{8}.*should be [0-9a-f]{8}.*copy or write",
    ("ranges", "empty"): r"found 0 of \d+ bytes", ("curl", "503"): "beginning b'<html>",
    ("curl", "stall in an image"): "no byte for 0.5 s", ("curl", "cut in an image"): "exit status 18 after",
    ("curl -f", "503"): "exit status 22",
}  # fmt: skip


@pytest.mark.parametrize("kind, name", SAID)
def test_the_error_says_what_was_found(server, kind, name):
    index = index_at(server, kind)
    server.faults[NAME] = [FAULTS[name]] * 40
    with pytest.raises(UserError, match=SAID[kind, name]):
        list(read_shard(index, timeout=timeout(name)))


FINAL = {"404": (faults.answer(404, "Not Found"), "no such file"), "403": (faults.answer(403, "Forbidden"), "403"),
         "ignores ranges": (faults.whole, "the server ignores ranges; .*pipe:curl")}  # fmt: skip


@pytest.mark.parametrize("name", FINAL)
def test_permanent_errors_are_not_retried(server, name):
    index, (fault, said) = index_at(server, "ranges"), FINAL[name]
    server.faults[NAME] = [fault] * 40
    with pytest.raises(PermanentError, match=f"{NAME}: .*{said}"):
        list(read_shard(index, 0, 3, retry_for=60))
    assert len(server.requests) == 1


def test_a_drip_ends_with_the_timeout_of_a_whole_block(server):
    """Each byte arrives within the timeout, but the block would take days."""
    index = index_at(server, "ranges")
    server.faults[NAME] = [faults.drip(0.05)] * 9
    with pytest.raises(UserError, match=f"{NAME}: no answer within 1 s"):
        list(read_shard(index, timeout=1))


def test_a_stuck_request_does_not_delay_the_end(server):
    """Of a reader that is closed while its thread reads ahead."""
    answered = []

    def stuck(handler: faults.Handler, data: bytes) -> None:
        faults.stall(lambda data: 10, 60)(handler, data)
        answered.append(data)

    index = index_at(server, "ranges")
    server.faults[NAME] = [faults.serve, faults.serve, *[stuck] * 9]
    samples = read_shard(index, 0, 7, timeout=60)
    next(samples)
    samples.close()
    assert not answered


# ---------------------------------------------------------------- commands, folders

COMMANDS = {
    "head -c 9000 {f}/%s; exit 3": "exit status 3 after 9000 bytes",
    "head -c 9000 {f}/%s": "found .* of .* bytes", "true || echo %s": "found 0 of", "exit 9; echo %s": "exit status 9",
    "echo '<html>%s not found</html>'": "beginning b'<html>", "kill -9 $$; echo %s": "exit status -9",
    "head -c 99999 /dev/urandom; echo %s": "CRC-32 should be", "cat 'a %s": "exit status 2",
    "no-such-command %s": "exit status 127", "cat \0 %s": "null byte",
    "echo 'version https://git-lfs.github.com/spec/v1' %s": "beginning b'version https://git-lfs",
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_that_fail(blocks, command):
    index = at(read_index(str(blocks), "train"), "pipe:" + command.format(f=blocks))
    with pytest.raises(UserError, match=COMMANDS[command]) as error:
        list(read_shard(index))
    assert NAME in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("command", ["cat {f}/%s; exit 7", "cat {f}/%s; sleep 100", "cat {f}/%s - < /dev/zero"])
def test_a_command_is_not_blamed_when_every_byte_is_right(blocks, command):
    index = at(read_index(str(blocks), "train"), "pipe:" + command.format(f=blocks))
    assert found(read_shard(index)) == expected(blocks)


def test_a_command_that_ends_in_silence_at_a_block_s_boundary_is_started_anew(blocks, tmp_path, monkeypatch):
    """Exit status 0 after the first block; each start adds a line to a file."""
    monkeypatch.setattr(script.random, "uniform", lambda low, high: 0)
    index, starts = read_index(str(blocks), "train"), tmp_path / "starts"
    first = next(block for block in index.blocks if index.entries[block.shard]["url"] == NAME)
    cut = f"pipe:echo x >>{starts}; head -c $([ $(wc -l <{starts}) = 1 ] && echo {first.length} || echo 1G) {blocks}/%s"
    assert found(read_shard(at(index, cut), retry_for=60)) == expected(blocks)
    assert starts.read_text() == "x\nx\n"


OTHERS = {"cut": lambda data: data[:9000], "empty": lambda data: b"", "zeros": lambda data: bytes(len(data)),
          "an LFS pointer": lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:00"}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_a_local_shard_of_other_bytes(blocks, tmp_path, name):
    """At once: a retry would read the same."""
    (tmp_path / NAME).write_bytes(OTHERS[name]((blocks / NAME).read_bytes()))
    index = at(read_index(str(blocks), "train"), str(tmp_path))
    with pytest.raises(PermanentError, match=f"{tmp_path}/{NAME}, 3 samples at byte .*copy or write .*again") as error:
        list(read_shard(index, retry_for=60))
    assert "LFS" not in name or "beginning b'version https://git-lfs" in str(error.value)
