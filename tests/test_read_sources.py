"""Prefix → bytes: where shards may be, what is sent there, what is printed of it, and which errors are retried."""

import errno
import os
import re
import resource
import shutil
import ssl
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import faults
import places
import pytest
from faults import ended, group, killed
from reading import NAME, at, expected, found, read_shard
from runs import in_terminal

import imagenet_shards as script
from imagenet_shards import PermanentError, PrefixError, UserError, locate, open_source, printable, read_index, retry


@pytest.fixture(scope="module")
def server(blocks):
    """http://127.0.0.1:PORT/ on the shards."""
    with faults.fault_server(blocks) as server:
        yield server.url


@pytest.fixture
def no_pauses(monkeypatch):
    """Retries follow each other at once."""
    monkeypatch.setattr(script.random, "uniform", lambda low, high: 0)


def index_at(blocks: Path, prefix: str) -> script.Index:
    return at(read_index(str(blocks), "train"), prefix)


# ---------------------------------------------------------------- prefixes

LOCATIONS = {  # prefix: location of x.tar
    "./data": "./data/x.tar", "/data/": "/data/x.tar", "/data/%s": "/data/x.tar", "/100%": "/100%/x.tar",
    "a::b": "a::b/x.tar", "pipe:cat /data/": "pipe:cat /data/x.tar", "http://host": "http://host/x.tar",
    "pipe:gsutil cat gs://bucket/%s": "pipe:gsutil cat gs://bucket/x.tar",
    "pipe:curl -s 'http://host/a%20b/%s?x=%2F' | cat": "pipe:curl -s 'http://host/a%20b/x.tar?x=%2F' | cat",
    "https://host/a%20b/": "https://host/a%20b/x.tar", "http://host/get?f=": "http://host/get?f=x.tar",
    "http://host/get?f=%s&t=a%2Fb": "http://host/get?f=x.tar&t=a%2Fb",
}  # fmt: skip


@pytest.mark.quick
def test_locate():
    assert {prefix: locate(prefix, "x.tar") for prefix in LOCATIONS} == LOCATIONS


PRINTED = {  # location: what messages show of it
    "/data/x.tar": "/data/x.tar", "https://host:8/x.tar": "https://host:8/x.tar", "pipe:": "pipe:",
    "https://me:secret@host/x.tar?token=secret#secret": "https://host/x.tar?...",
    "http://host/x.tar?sig=se/cret": "http://host/x.tar?...",
    "s3://key:sec@ret@bucket/x": "s3://bucket/x",
    "pipe:curl -s 'http://me@host/x.tar?a=b' | cat": "pipe:curl … http://host/x.tar?...",
    "pipe:curl -H 'Authorization: Bearer secret' https://host/x": "pipe:curl … https://host/x",
    "pipe:TOKEN=secret KEY=secret curl -u me:secret ftp://me:secret@host/%s": "pipe:curl … ftp://host/%s",
}  # fmt: skip


@pytest.mark.quick
def test_messages_show_no_user_password_query_or_header():
    assert {location: printable(location) for location in PRINTED} == PRINTED
    assert {location: printable(location) for location in PRINTED.values()} == {x: x for x in PRINTED.values()}


PREFIXES = {
    "folder": "{folder}", "pattern": "{folder}/%s", "http": "{url}", "http pattern": "{url}%s?token=a%20b",
    "curl": "pipe:curl -s {url}", "command with a pattern": "pipe:cat '{folder}/'%s | cat",
}  # fmt: skip


@pytest.mark.parametrize("kind", PREFIXES)
def test_any_part_of_a_shard_from_any_kind_of_prefix(blocks, server, kind):
    index = read_index(PREFIXES[kind].format(folder=blocks, url=server), "train")
    truth = expected(blocks)
    for start, stop in ((0, 7), (0, 3), (2, 5), (6, 7), (4, 7)):
        assert found(read_shard(index, start, stop)) == truth[start:stop]


def test_names_that_a_shell_or_a_url_would_have_to_quote(blocks, tmp_path):
    """In a folder, and in the path of a URL: spaces, quotes, non-ASCII letters, percent signs."""
    folder = shutil.copytree(blocks, tmp_path / "a b'c$(touch x)dätä%20")
    with places.nginx(tmp_path) as url:
        quoted, partly = urllib.parse.quote(folder.name), folder.name.replace("%20", "%2520")
        for prefix in (str(folder), url + quoted, url + partly, f"pipe:curl -s '{url}{quoted}/%s'"):
            assert found(read_shard(read_index(prefix, "train"))) == expected(blocks)


@pytest.mark.parametrize("url", ["s3://bucket", "gs://bucket/"])
def test_bucket_urls_are_read_by_their_own_commands(blocks, tmp_path, monkeypatch, url):
    shutil.copytree(blocks, tmp_path / "bucket")
    with places.s3("bucket", blocks) if url.startswith("s3") else places.gcs(tmp_path) as env:
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        index = read_index(url, "train")
        assert not index.seekable and found(read_shard(index, timeout=60)) == expected(blocks)


# ---------------------------------------------------------------- what is sent


def test_a_password_is_sent_to_its_host_only_and_is_in_no_message(blocks):
    """A redirect to another host, such as a signed URL, must not carry it; curl does not send it either."""
    with faults.fault_server(blocks) as first, faults.fault_server(blocks) as second:
        elsewhere = faults.redirect(second.url.replace("127.0.0.1", "localhost"))
        first.faults = {path.name: [elsewhere] * 9 for path in blocks.iterdir()}
        index = read_index(first.url.replace("//", "//user:pass%20word@"), "train")
        assert found(read_shard(index)) == expected(blocks)
        first.faults[NAME] = [faults.answer(503, "Busy")] * 9
        with pytest.raises(UserError, match=f"from http://127.0.0.1:.*/{NAME}: HTTP status 503") as error:
            list(read_shard(index))
    assert {*first.passwords} == {"Basic dXNlcjpwYXNzIHdvcmQ="} and {*second.passwords} == {None}
    assert "user" not in str(error.value) and "word" not in str(error.value)


def test_a_proxy_of_the_environment_is_used(blocks, monkeypatch):
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setattr(urllib.request, "_opener", None)  # it reads the environment once
    with faults.fault_server(blocks) as server:
        monkeypatch.setenv("http_proxy", server.url)
        assert found(read_shard(read_index("http://shards.example/", "train"))) == expected(blocks)


# ---------------------------------------------------------------- errors that pass, and errors that do not


@pytest.mark.parametrize("number", ["EIO", "ESTALE", "ETIMEDOUT", "EMFILE", "EINTR", "ENOENT", "EACCES", "EISDIR"])
def test_an_error_of_a_folder_is_final_only_if_it_cannot_pass(blocks, no_pauses, number, monkeypatch, capsys):
    """The first are those of network file systems. open() fails as it would: none of them can be made at will."""
    index, real, failed = read_index(str(blocks), "train"), open, []

    def fail(path: str, *args, **options):
        if str(path).endswith(NAME) and len(failed) < 2:
            failed.append(path)
            raise OSError(getattr(errno, number), os.strerror(getattr(errno, number)), path)
        return real(path, *args, **options)

    monkeypatch.setattr("builtins.open", fail)
    if number in ("ENOENT", "EACCES", "EISDIR"):
        with pytest.raises(PermanentError, match=os.strerror(getattr(errno, number))):
            list(read_shard(index, retry_for=60))
    else:
        assert found(read_shard(index, retry_for=60)) == expected(blocks) and len(failed) == 2
        assert capsys.readouterr().err.count(os.strerror(getattr(errno, number))) == 2


def test_retries_last_for_a_time_with_pauses_that_grow_and_differ(monkeypatch, capsys):
    clock, pauses = [0.0], []

    class Stop(threading.Event):
        def wait(self, pause: float) -> None:
            pauses.append(pause)
            clock[0] += pause

    def read() -> None:
        raise UserError("no")

    monkeypatch.setattr(script.time, "monotonic", lambda: clock[0])
    with pytest.raises(UserError, match="^no$"):
        retry(read, 300, Stop())
    assert sum(pauses) == pytest.approx(300) and len(set(pauses)) == len(pauses) == capsys.readouterr().err.count("no;")
    assert all(min(60, 2**n) / 2 <= pause <= min(60, 2**n) for n, pause in enumerate(pauses[:-1]))


def test_a_server_that_is_down_for_some_seconds_costs_nothing(blocks, capsys):
    """More often than a number of retries would allow: it is started again under the same port."""
    port = places.free_port()
    index = index_at(blocks, f"http://127.0.0.1:{port}/")
    with ExitStack() as stack:
        starting = threading.Timer(4, lambda: stack.enter_context(faults.fault_server(blocks, port=port)))
        starting.start()
        assert found(read_shard(index, retry_for=60)) == expected(blocks)
        starting.join()
    assert capsys.readouterr().err.count("Connection refused; next try in") >= 2


FINAL_AT_FIRST = {
    "a page that does not exist": ("{url}nowhere/", "HTTP status 404 Not Found.*is --shards=.*nowhere/ right"),
    "a host that does not exist": ("http://no-such-host.invalid/", "Name or service|Temporary failure|No address"),
    "a port that is none": ("http://127.0.0.1:99999999/", "not a valid URL"),
    "a bracket": ("http://[::1/", "not a valid URL"),
    "an empty host": ("http:///data", "not a valid URL .it names no host"),
    "a redirect loop": ("{url}loop/", "HTTP status 302 .*redirect error.*infinite loop"),
    "no such command": ("pipe:no-such-command ", "exit status 127: .*not found"),
    "a shell error": ("pipe:cat 'a ", "exit status 2: .*[Uu]nterminated|exit status 2"),
    "a null byte": ("pipe:cat \0 ", "null byte"),
    "not UTF-8": ("\udcff", "no such folder"),
    "another protocol": ("az://bucket/x", "^az://bucket/x: cannot read az:// URLs; name a command: pipe:COMMAND %s"),
    "a command that fails": ("pipe:curl -sf {url}nowhere/", "exit status 22"),
}


@pytest.mark.parametrize("name", FINAL_AT_FIRST)
def test_a_wrong_prefix_is_final_at_the_first_read(blocks, name, capsys):
    """Without a retry, although they last for minutes."""
    prefix, said = FINAL_AT_FIRST[name]
    with faults.fault_server(blocks) as server:
        server.faults["loop/imagenet-train.json"] = [faults.redirect(server.url + "loop/")] * 99
        with pytest.raises((PermanentError, PrefixError), match=said) as error:
            read_index(prefix.format(url=server.url), "train", retry_for=300)
    assert capsys.readouterr().err == "" and "\n" not in str(error.value)


def test_a_certificate_that_is_not_trusted_is_final_at_the_first_read(blocks, tmp_path, capsys):
    key, certificate = tmp_path / "key", tmp_path / "certificate"
    words = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=localhost -days 2".split()
    subprocess.run([*words, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    with faults.fault_server(blocks) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        with pytest.raises(PrefixError, match="certificate verify failed: self.signed certificate"):
            read_index(server.url.replace("http:", "https:"), "train", retry_for=300)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("prefix", ["pipe:exit 5; echo %s", "http://127.0.0.1:{port}/"])
def test_the_same_errors_are_retried_later_in_a_run(blocks, no_pauses, prefix, capsys):
    """A bucket's command may fail for many reasons; only while nothing was read it is likely to be wrong."""
    index = index_at(blocks, prefix.format(port=places.free_port()))
    with pytest.raises(UserError, match=NAME):
        list(read_shard(index, retry_for=0.2))
    assert capsys.readouterr().err.count("next try in") > 2


# ---------------------------------------------------------------- slow servers and servers without ranges


@pytest.mark.parametrize("kind", ["{url}", "pipe:curl -sN {url}"])
def test_a_byte_a_second_is_too_slow(blocks, kind, monkeypatch):
    """Each byte arrives within the timeout, but the block would take days."""
    monkeypatch.setattr(script, "MIN_RATE", 2000)
    with faults.fault_server(blocks) as server:
        index = index_at(blocks, kind.format(url=server.url))
        server.faults[NAME] = [faults.drip(0.05)] * 9
        with pytest.raises(UserError, match=rf"{NAME}.*: only \d+ bytes in \d+ s"):
            list(read_shard(index, timeout=1))


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_server_that_ignores_ranges_now_or_later_is_read_by_a_command(blocks, after, capsys):
    """After so many ranges it sends whole files, as some do for large ones. One line says so; the bytes are right."""
    with faults.fault_server(blocks) as server:
        index = index_at(blocks, server.url)
        server.faults[NAME] = [faults.serve] * after + [faults.whole] * 99
        assert found(read_shard(index)) == expected(blocks)
    assert capsys.readouterr().err.count(f"{server.url}: the server ignores ranges") == 1


def test_an_index_that_is_cut_without_a_length_is_an_error(blocks):
    with faults.fault_server(blocks) as server:
        server.faults["imagenet-train.json"] = [faults.cut(lambda data: 300, tell=False)]
        with pytest.raises(UserError, match="expected an index, found its first 300 bytes; it is cut"):
            read_index(server.url, "train")
        server.faults["imagenet-train.json"] = [faults.cut(lambda data: 300), faults.answer(503, "Busy")]
        assert read_index(server.url, "train", retry_for=60).total == 60  # these are retried


# ---------------------------------------------------------------- commands


@pytest.mark.parametrize("command", ["sleep 100; cat {f}/%s", "(head -c 9000; sleep 100) < {f}/%s"])
def test_a_command_that_stalls_is_ended(blocks, tmp_path, command):
    index = index_at(blocks, f"pipe:echo $$ >{tmp_path}/pid; " + command.format(f=blocks))
    with pytest.raises(UserError, match=r"no byte for 1\.5 s"):
        list(read_shard(index, timeout=1.5))
    assert ended(group(int((tmp_path / "pid").read_text())))


def test_a_reader_that_ends_early_ends_its_command_in_silence(blocks, tmp_path, capfd):
    """And all that the command started, which is its process group."""
    slow = f"pipe:echo $$ > {tmp_path}/pid; cat {blocks}/%s | (cat; sleep 300; exit 5)"
    samples = read_shard(index_at(blocks, slow), 0, 3)
    assert len(list(samples)) == 3
    del samples
    assert ended(group(int((tmp_path / "pid").read_text()))) and capfd.readouterr().err == ""


def test_a_command_that_may_not_be_killed_is_left(monkeypatch):
    """As one that runs as another user, by sudo: the error of kill is not the user's."""
    source = open_source("pipe:echo ", 5)
    assert source.read("x") == b"x\n"
    monkeypatch.setattr(script.os, "killpg", lambda *args: (_ for _ in ()).throw(PermissionError))
    source.close()


def test_a_command_is_ended_at_once_if_its_reader_was_closed_before():
    """As by the end of the run, while a thread is about to read the next block."""
    source = open_source("pipe:sleep 30; echo ", 60)
    source.close()
    with pytest.raises(UserError, match="exit status -9"):
        source.read("x")


def test_a_slow_reader_is_not_a_stalled_command(blocks):
    got = []
    for sample in read_shard(index_at(blocks, f"pipe:cat {blocks}/"), timeout=1):
        time.sleep(0.3)
        got.append(sample)
    assert found(got) == expected(blocks)


def test_of_a_commands_messages_the_end_is_kept(blocks):
    """300 MB of them take neither the memory nor the place of the reason."""

    def work() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, the most so far
        try:
            read_index("pipe:(yes no | head -c 300000000; echo the reason) >&2; exit 3; echo ", "train")
        except PrefixError as error:
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            return 10 + (grown < 50_000) + 2 * bool(re.search("exit status 3: .{0,300} the reason", str(error)))
        return 1

    assert in_terminal(80, work) == (13, "")


def test_a_killed_main_process_leaves_no_command_behind(blocks):
    """Killed while it reads the index, by a command that stalls."""

    prefix = f"pipe:(sleep 1000) | cat {blocks}/%s -"
    pids = killed(1, lambda: read_index(prefix, "train", timeout=100))
    assert len(pids) >= 3 and ended(pids)


