"""Every fault of a source ends in exactly the right samples, once each, or in an error that names it."""

import gc
import os
import socket
import threading
import time
import urllib.parse
import urllib.request
from dataclasses import replace
from pathlib import Path

import faults
import pytest
from reading import NAME, at, expected, found, places, read_shard

import imagenet_train as script

# How the shards are read: ranges, a server that ignores ranges, and two commands.
KINDS = {"ranges": "{url}", "no ranges": "{url}", "curl": "pipe:curl -s {url}", "curl -f": "pipe:curl -sf {url}%s"}


@pytest.fixture
def server(blocks, request, monkeypatch):
    monkeypatch.setattr(script.random, "uniform", lambda low, high: 0)  # no pauses between retries
    with faults.fault_server(blocks, ranges="no ranges" not in request.node.name) as server:
        yield server


def index_at(server, kind: str) -> script.Index:
    index = script.read_index(KINDS[kind].format(url=server.url), "train", timeout=20)
    assert index.seekable == (kind == "ranges")
    server.requests.clear()
    return index


def place(name: str):
    return lambda data: places(data)[name]


PLACES = [
    "at the start",
    "in the first header",
    "between samples",
    "between cls and jpg",
    "in a header",
    "in an image",
    "in the last image",
    "in the last padding",
]
FAULTS = {f"cut {name}": faults.cut(place(name)) for name in PLACES}
FAULTS |= {f"cut {name}, exit status 0": faults.cut(place(name), tell=False) for name in PLACES}
FAULTS |= {f"reset {name}": faults.reset(place(name)) for name in ("at the start", "in a header", "in an image")}
FAULTS |= {f"stall {name}": faults.stall(place(name)) for name in ("at the start", "in an image")}
FAULTS |= {
    "503": faults.answer(503, "Service Temporarily Unavailable"),
    "429": faults.answer(429, "Too Many Requests"),
    "a page with status 200": faults.answer(200, "Please log in"),
    "a length too large": faults.wrong_length(1000),
    "empty": faults.other_bytes(lambda data: b""),
    "noise": faults.other_bytes(lambda data: os.urandom(len(data))),
    "one flipped bit": faults.other_bytes(lambda data: data[:700] + bytes([data[700] ^ 1]) + data[701:]),
    "two blocks swapped": faults.other_bytes(lambda data: data[len(data) // 2 :] + data[: len(data) // 2]),
    "begun again within itself": faults.other_bytes(lambda data: data[: places(data)["between samples"]] + data),
}
# Faults that leave all the wanted bytes intact, so that no read fails.
HARMLESS = ("a length too large",)


def timeout(name: str) -> float:
    """Seconds to wait for a byte: few where the test is that none comes."""
    return 0.5 if name.startswith("stall") else 60


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_that_passes_costs_nothing(blocks, server, name, kind, capsys):
    """The fault twice, then good answers: exactly the right samples, once each."""
    index = index_at(server, kind)
    server.faults[NAME] = [FAULTS[name]] * 2
    assert found(read_shard(index, retries=2, timeout=timeout(name))) == expected(blocks)
    if name not in HARMLESS:
        assert not server.faults[NAME]  # both were met
    if name not in HARMLESS and kind == "ranges":  # a stream that breaks after its first block is opened again first
        assert "; retry 1 of 2" in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_that_stays_is_named_after_the_right_samples(blocks, server, name, kind):
    index = index_at(server, kind)
    server.faults[NAME] = [FAULTS[name]] * 40
    got = []
    if name in HARMLESS:
        return
    with pytest.raises(script.TrainError, match=f"^{NAME}, . samples? at byte .*, from .*127.0.0.1.*: ") as error:
        for sample in read_shard(index, retries=1, timeout=timeout(name)):
            got.append(sample)
    assert found(got) == expected(blocks)[: len(got)]
    assert "\n" not in str(error.value) and len(str(error.value)) < 700


SAID = {
    ("ranges", "503"): "HTTP status 503 Service Unavailable",
    ("ranges", "a page with status 200"): "found 1.. of .* bytes, a page that says '200 Please log in",
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
    with pytest.raises(script.TrainError, match=SAID[kind, name]):
        list(read_shard(index, timeout=timeout(name)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("status, text", [(404, "Not Found"), (403, "Forbidden")])
def test_a_permanent_error_is_not_retried(server, kind, status, text):
    index = index_at(server, kind)
    server.faults[NAME] = [faults.answer(status, text)] * 40
    with pytest.raises(script.TrainError, match=NAME) as error:
        list(read_shard(index, 0, 3, retries=5))
    silent = kind == "curl -f"  # nothing but exit status 22; without -f curl gets a page
    assert silent or str(status) in str(error.value)
    assert isinstance(error.value, script.PermanentError) == (not silent)
    assert len(server.requests) == (6 if silent else 1)


@pytest.mark.parametrize("command", ["no-such-command %s", "cat /no/such/folder/%s", "sh -c 'exit 126' %s"])
def test_commands_that_cannot_work_are_not_retried(blocks, command):
    index = at(script.read_index(str(blocks), "train"), f"pipe:{command}")
    with pytest.raises(script.PermanentError, match=NAME):
        list(read_shard(index, retries=5))


@pytest.mark.parametrize(
    "command, said",
    [
        ("head -c 9000 {f}/%s; exit 3", "found .* bytes, then the command failed with exit status 3: no message"),
        ("head -c 9000 {f}/%s; echo no space >&2; exit 1", "exit status 1: no space"),
        ("head -c 9000 {f}/%s", "found .* of .* bytes"),
        ("true || echo %s", "found 0 of"),
        ("exit 9; echo %s", "exit status 9"),
        ("echo '<html>%s not found</html>'", "a page that says 'imagenet-train-000001.tar not found'"),
        ("yes '<html>%s not found</html>' | head -c 99999", "a page that says 'imagenet-train-000001.tar not found"),
        ("head -c 99999 /dev/urandom; echo %s", "CRC-32 is"),
        ("kill -9 $$; echo %s", "exit status -9"),
    ],
)
def test_commands_that_fail(blocks, command, said):
    index = at(script.read_index(str(blocks), "train"), "pipe:" + command.format(f=blocks))
    with pytest.raises(script.TrainError, match=said) as error:
        list(read_shard(index))
    assert NAME in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("command", ["cat {f}/%s; exit 7", "cat {f}/%s; sleep 100", "cat {f}/%s - < /dev/zero"])
def test_a_command_is_not_blamed_when_every_byte_is_right(blocks, command):
    index = at(script.read_index(str(blocks), "train"), "pipe:" + command.format(f=blocks))
    assert found(read_shard(index)) == expected(blocks)


def test_the_pauses_grow_and_differ(blocks, capsys, monkeypatch):
    pauses = []
    monkeypatch.setattr(script.time, "sleep", pauses.append)
    with pytest.raises(script.TrainError, match="exit status 5"):
        script.read_index("pipe:exit 5; echo %s", "train", retries=8)
    pauses = [pause for pause in pauses if pause > 0.4]  # the others are how subprocess waits
    assert len(pauses) == 8 and len(set(pauses)) == 8
    assert all(min(60, 2**n) / 2 <= pause <= min(60, 2**n) for n, pause in enumerate(pauses))


def test_the_index_is_retried_too(server):
    server.faults["imagenet-train.json"] = [faults.answer(503, "Busy"), faults.cut(lambda data: 100)]
    assert script.read_index(server.url, "train", retries=2).total == 60


@pytest.mark.parametrize("cut", ["at the start", "in an image", "in the last padding"])
def test_a_local_shard_that_is_cut(blocks, tmp_path, cut):
    (tmp_path / NAME).write_bytes((blocks / NAME).read_bytes()[: place(cut)((blocks / NAME).read_bytes())])
    index = at(script.read_index(str(blocks), "train"), str(tmp_path))
    with pytest.raises(
        script.PermanentError, match=f"{NAME}, . samples? at byte .*{tmp_path}.*copy or convert the shard again"
    ):
        assert found(read_shard(index, retries=5)) == expected(blocks)[:-1]


# ---------------------------------------------------------------- connections, stalls, what is left behind


def test_a_connection_that_the_server_closes_during_a_pause_is_no_failure(blocks, capsys):
    """As in a long validation: the stream is opened again, and that is not a retry."""
    with faults.fault_server(blocks, ranges=False) as server:
        index = script.read_index(server.url, "train")
        source = script.open_source(index.prefix, 20)
        first, second, third = (block for block in index.blocks if index.names[block.shard] == NAME)
        server.faults[NAME] = [faults.cut(lambda data: first.length + 100)]
        assert len(script.fetch(source, index, first)) == first.length
        time.sleep(0.2)
        for block in (second, third):
            assert len(script.fetch(source, index, block)) == block.length
        source.close()
    assert server.requests.count(NAME) == 2


def test_a_proxy_of_the_environment_is_used(blocks, monkeypatch):
    asked = []

    class Proxy(faults.Handler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.path = urllib.parse.urlsplit(self.path).path
            super().do_GET()

    with faults.fault_server(blocks) as server:
        server.RequestHandlerClass = Proxy
        monkeypatch.setenv("http_proxy", server.url)
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.setattr(urllib.request, "_opener", None)  # it reads the environment once
        index = script.read_index("http://shards.example/", "train")
        assert found(read_shard(index)) == expected(blocks)
    assert asked and all(url.startswith("http://shards.example/imagenet-") for url in asked)


def test_user_and_password_reach_the_server_and_no_message(blocks, monkeypatch, capsys):
    headers = []

    class Private(faults.Handler):
        def do_GET(self) -> None:
            headers.append(self.headers.get("Authorization"))
            super().do_GET()

    with faults.fault_server(blocks) as server:
        server.RequestHandlerClass = Private
        url = server.url.replace("//", "//user:pass%20word@")
        index = script.read_index(url, "train")
        server.faults[NAME] = [FAULTS["503"]] * 9
        with pytest.raises(
            script.TrainError, match="from http://127.0.0.1:.*/imagenet-train-000001.tar: HTTP status 503"
        ) as error:
            list(read_shard(index))
    assert set(headers) == {"Basic dXNlcjpwYXNzIHdvcmQ="}
    assert "user" not in str(error.value) and "word" not in str(error.value)


def test_a_stuck_request_does_not_delay_the_end(blocks):
    with faults.fault_server(blocks) as server:
        index = script.read_index(server.url, "train")
        server.faults[NAME] = [faults.serve, *[faults.stall(lambda data: 10, 60)] * 9]
        samples, begun = read_shard(index, 0, 7, timeout=60), time.monotonic()
        next(samples)
        samples.close()
    assert time.monotonic() - begun < 30  # not the stall's 60


def alive(group: int) -> list[str]:
    """The states of a group's processes that still run a second later; not of those that only wait to be reaped."""
    for _ in range(50):
        stats = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                stats.append(path.read_text().rpartition(")")[2].split())
            except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
                continue
        states = [stat[0] for stat in stats if int(stat[2]) == group and stat[0] != "Z"]
        if not states:
            break
        time.sleep(0.02)  # a SIGKILL takes its time
    return states


@pytest.mark.parametrize("command", ["sleep 100; cat {f}/%s", "(head -c 9000; sleep 100) < {f}/%s"])
def test_a_command_that_stalls_is_ended(blocks, tmp_path, command):
    command = f"echo $$ >{tmp_path}/pid; " + command.format(f=blocks)
    index = at(script.read_index(str(blocks), "train"), f"pipe:{command}")
    with pytest.raises(script.TrainError, match=r"no byte for 0\.3 s"):
        list(read_shard(index, timeout=0.3))
    assert not alive(int((tmp_path / "pid").read_text()))


def test_a_reader_that_ends_early_ends_its_command_in_silence(blocks, tmp_path, capfd):
    """With all the command's children; no descriptor and no thread is left."""
    index = script.read_index(str(blocks), "train")
    slow = f"pipe:echo $$ > {tmp_path}/pid; cat {blocks}/%s | (cat; sleep 300; exit 5)"
    gc.collect()  # what earlier tests left would be closed meanwhile
    before = len(os.listdir("/proc/self/fd")), threading.active_count()

    def left() -> bool:  # not ==: a thread of an earlier test may end meanwhile
        return len(os.listdir("/proc/self/fd")) > before[0] or threading.active_count() > before[1]

    samples = read_shard(at(index, slow), 0, 3)
    assert len(list(samples)) == 3
    del samples
    assert not alive(int((tmp_path / "pid").read_text()))
    give_up = time.monotonic() + 20
    while left() and time.monotonic() < give_up:
        time.sleep(0.02)
    assert not left()
    assert capfd.readouterr().err == ""


def test_a_command_that_may_not_be_killed_is_left(monkeypatch):
    """As one that runs as another user, by sudo: the error of kill is not the user's."""

    def refuse(*args) -> None:
        raise PermissionError

    source = script.open_source("pipe:echo ", 5)
    assert source.read("x") == b"x\n"
    monkeypatch.setattr(script.os, "killpg", refuse)
    source.close()


def test_a_slow_reader_is_not_a_stalled_command(blocks):
    index = script.read_index(f"pipe:cat {blocks}/", "train")
    got = []
    for sample in read_shard(index, timeout=1):
        time.sleep(0.3)
        got.append(sample)
    assert found(got) == expected(blocks)


def test_a_server_that_cannot_be_reached_is_retried(blocks, monkeypatch, capsys):
    monkeypatch.setattr(script.random, "uniform", lambda low, high: 0)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        index = replace(script.read_index(str(blocks), "train"), prefix=f"http://127.0.0.1:{unused.getsockname()[1]}/")
        with pytest.raises(script.TrainError, match="Connection refused"):
            list(read_shard(index, 0, 3, retries=2))
    assert "Connection refused; retry 2 of 2" in capsys.readouterr().err
