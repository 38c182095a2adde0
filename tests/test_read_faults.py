"""Faulty servers and commands, in every way of reading: the right samples, once each, or an error that names them."""

import os
import time

import faults
import pytest
from reading import NAME, at, expected, found, places, read_shard

import imagenet_shards as script
from imagenet_shards import Index, PermanentError, UserError, read_index

# How the shards are read: ranges, a server that ignores ranges, and two commands.
KINDS = {"ranges": "{url}", "no ranges": "{url}", "curl": "pipe:curl -s {url}", "curl -f": "pipe:curl -sf {url}%s"}


@pytest.fixture
def server(blocks, request, monkeypatch):
    monkeypatch.setattr(script.random, "uniform", lambda low, high: 0)  # no pauses between retries
    with faults.fault_server(blocks, ranges="no ranges" not in request.node.name) as server:
        yield server


def index_at(server, kind: str) -> Index:
    index = read_index(KINDS[kind].format(url=server.url), "train", timeout=20)
    assert index.seekable == (kind == "ranges")
    server.requests.clear()
    return index


def place(name: str) -> faults.Place:
    return lambda data: places(data)[name]


PLACES = ["at the start", "in the first header", "between samples", "between cls and jpg", "in a header", "in an image",
          "in the last image", "in the last padding"]
FAULTS = {f"cut {name}": faults.cut(place(name)) for name in PLACES}
FAULTS |= {f"cut {name}, exit status 0": faults.cut(place(name), tell=False) for name in PLACES}
FAULTS |= {f"reset {name}": faults.reset(place(name)) for name in ("at the start", "in a header", "in an image")}
FAULTS |= {f"stall {name}": faults.stall(place(name)) for name in ("at the start", "in an image")}
FAULTS |= {
    "503": faults.answer(503, "Service Temporarily Unavailable"),
    "429": faults.answer(429, "Too Many Requests"),
    "a page with status 200": faults.answer(200, "Please log in"),
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
    assert not server.faults[NAME]  # both were met
    if kind == "ranges" and "page" not in name:  # a stream that breaks after its first block is opened again first
        assert "; next try in" in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_that_stays_is_named_after_the_right_samples(blocks, server, name, kind):
    index, got = index_at(server, kind), []
    server.faults[NAME] = [FAULTS[name]] * 40
    with pytest.raises(UserError, match=f"^{NAME}, . samples? at byte .*, from .*127.0.0.1.*: ") as error:
        for sample in read_shard(index, timeout=timeout(name)):
            got.append(sample)
    assert found(got) == expected(blocks)[: len(got)]
    assert "\n" not in str(error.value) and len(str(error.value)) < 700


SAID = {
    ("ranges", "503"): "HTTP status 503 Service Unavailable",
    ("ranges", "stall in an image"): "timed out",
    ("ranges", "one flipped bit"): "CRC-32 is [0-9a-f]{8}, the index lists [0-9a-f]{8}",
    ("ranges", "cut in an image"): r"found \d+ of \d+ bytes",
    ("no ranges", "503"): "the command failed with exit status 22: curl: .*503",
    ("curl", "503"): "a page that says '503 Service Temporarily Unavailable",
    ("curl", "stall in an image"): "no byte for 0.5 s",
    ("curl", "cut in an image"): "then the command failed with exit status 18: no message",
}


@pytest.mark.parametrize("kind, name", SAID)
def test_the_error_says_what_was_found(server, kind, name):
    index = index_at(server, kind)
    server.faults[NAME] = [FAULTS[name]] * 40
    with pytest.raises(UserError, match=SAID[kind, name]):
        list(read_shard(index, timeout=timeout(name)))


@pytest.mark.parametrize("status, text", [(404, "Not Found"), (403, "Forbidden")])
def test_http_s_permanent_errors_are_not_retried(server, status, text):
    index = index_at(server, "ranges")
    server.faults[NAME] = [faults.answer(status, text)] * 40
    with pytest.raises(PermanentError, match=f"{NAME}.*HTTP status {status}"):
        list(read_shard(index, 0, 3, retry_for=60))
    assert len(server.requests) == 1


# ---------------------------------------------------------------- commands

COMMANDS = {
    "head -c 9000 {f}/%s; exit 3": "found .* bytes, then the command failed with exit status 3: no message",
    "head -c 9000 {f}/%s; echo no space >&2; exit 1": "exit status 1: no space",
    "head -c 9000 {f}/%s; echo see http://u:secret@h/x?sig=secret >&2; exit 1": r"exit status 1: see http://h/x\?\.\.\.$",
    "head -c 9000 {f}/%s": "found .* of .* bytes",
    "true || echo %s": "found 0 of",
    "exit 9; echo %s": "exit status 9",
    "echo '<html>%s not found</html>'": f"a page that says '{NAME} not found'",
    "yes '<html>%s not found</html>' | head -c 99999": f"a page that says '{NAME} not found",
    "head -c 99999 /dev/urandom; echo %s": "CRC-32 is",
    "kill -9 $$; echo %s": "exit status -9",
}


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


# ---------------------------------------------------------------- folders, connections


@pytest.mark.parametrize("cut", ["at the start", "in an image", "in the last padding"])
def test_a_local_shard_that_is_cut(blocks, tmp_path, cut):
    (tmp_path / NAME).write_bytes((blocks / NAME).read_bytes()[: place(cut)((blocks / NAME).read_bytes())])
    index = at(read_index(str(blocks), "train"), str(tmp_path))
    said = f"{NAME}, . samples? at byte .*{tmp_path}.*copy or convert the shard again"
    with pytest.raises(PermanentError, match=said):
        list(read_shard(index, retry_for=60))


def test_a_connection_that_the_server_closes_during_a_pause_is_no_failure(blocks, capsys):
    """As in a long validation: the stream is opened again, and that is not a retry."""
    with faults.fault_server(blocks, ranges=False) as server:
        index = read_index(server.url, "train")
        source = script.open_source(index.prefix, 20)
        first, second, third = (block for block in index.blocks if index.shards[block.shard]["url"] == NAME)
        server.faults[NAME] = [faults.cut(lambda data: first.length + 100)]
        assert len(script.fetch(source, index, first)) == first.length
        time.sleep(0.2)
        for block in (second, third):
            assert len(script.fetch(source, index, block)) == block.length
        source.close()
    assert server.requests.count(NAME) == 2


def test_a_stuck_request_does_not_delay_the_end(blocks):
    """Of a reader that is closed while its thread reads ahead."""
    answered = []

    def stuck(handler: faults.Handler, data: bytes) -> None:
        faults.stall(lambda data: 10, 60)(handler, data)
        answered.append(data)

    with faults.fault_server(blocks) as server:
        index = read_index(server.url, "train")
        server.faults[NAME] = [faults.serve, *[stuck] * 9]
        samples = read_shard(index, 0, 7, timeout=60)
        next(samples)
        samples.close()
        assert not answered
