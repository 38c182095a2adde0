"""Prefix → bytes: where shards may be, what is sent there, what is printed of it, and which errors are retried."""

import errno
import os
import shutil
import threading
import time
import urllib.parse
from contextlib import ExitStack
from pathlib import Path

import faults
import places
import pytest
from faults import ended, group, killed
from reading import NAME, at, expected, found, labels_of, read_shard

import imagenet_shards as script
import imagenet_train
from imagenet_shards import PermanentError, UserError, locate, open_source, printable, read_index, retry


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
PRINTED = {  # location: what messages show of it
    "/data/x.tar": "/data/x.tar", "https://host:8/x.tar": "https://host:8/x.tar", "pipe:": "pipe:",
    "https://me:secret@host/x.tar?token=secret#secret": "https://host/x.tar?...",
    "http://host/x.tar?sig=se/cret": "http://host/x.tar?...", "s3://key:sec@ret@bucket/x": "s3://bucket/x",
    "s3://key:sec/r#e?t@bucket/x": "s3://bucket/x", "http:/me:secret@host/x": "http:/host/x",
    "http://me:sec'ret@host/x": "http://host/x", 'http://me:sec"ret@host/x': "http://host/x",
    "pipe:curl -s 'http://me@host/x.tar?a=b' | cat": "pipe:curl … http://host/x.tar?...",
    "pipe:curl -H 'Authorization: Bearer secret' https://host/x": "pipe:curl … https://host/x",
    "pipe:TOKEN=secret KEY=secret curl -u me:secret ftp://me:secret@host/%s": "pipe:curl … ftp://host/%s",
    "pipe:TOKEN='a secret' aws s3 cp s3://b/%s -": "pipe:aws … s3://b/%s",
    "pipe:curl -H 'secret s3://b/%s": "pipe: … s3://b/%s",
}  # fmt: skip


@pytest.mark.quick
def test_locate_and_what_messages_show():
    """No user, password, query or header."""
    assert {prefix: locate(prefix, "x.tar") for prefix in LOCATIONS} == LOCATIONS
    assert {location: printable(location) for location in PRINTED} == PRINTED
    plain = [text for text in PRINTED.values() if "…" not in text]
    assert [printable(text) for text in plain] == plain


PREFIXES = {
    "folder": "{folder}", "pattern": "{folder}/%s", "http": "{url}", "http pattern": "{url}%s?token=a%20b",
    "curl": "pipe:curl -s {url}", "command with a pattern": "pipe:cat '{folder}/'%s | cat", "file": "file://{folder}",
}  # fmt: skip


@pytest.mark.parametrize("kind", PREFIXES)
def test_any_part_of_a_shard_from_any_kind_of_prefix(blocks, kind):
    truth = expected(blocks)
    with faults.fault_server(blocks) as server:
        index = read_index(PREFIXES[kind].format(folder=blocks, url=server.url), "train")
        for start, stop in ((0, 7), (0, 3), (2, 5), (6, 7), (4, 7)):
            assert found(read_shard(index, start, stop)) == truth[start:stop]


def test_names_that_a_shell_or_a_url_would_have_to_quote(blocks, tmp_path):
    """In a folder, and in the path of a URL: spaces, quotes, non-ASCII letters, percent signs."""
    folder = shutil.copytree(blocks, tmp_path / "a b'c$(touch x)dätä%20")
    with places.nginx(tmp_path) as url:
        quoted = urllib.parse.quote(folder.name)
        for prefix in (str(folder), url + quoted, f"pipe:curl -s '{url}{quoted}/%s'"):
            assert found(read_shard(read_index(prefix, "train"))) == expected(blocks)


# ---------------------------------------------------------------- what is sent, what is printed


def test_a_password_is_sent_to_its_host_only_and_is_in_no_message(blocks):
    """A redirect to another host, such as a signed URL, must not carry it; curl does not send it either."""
    with faults.fault_server(blocks) as first, faults.fault_server(blocks) as second:
        elsewhere = faults.redirect(second.url.replace("127.0.0.1", "localhost"))
        for prefix in ("{}", "pipe:curl -sfL {}"):
            first.faults = {path.name: [elsewhere] * 9 for path in blocks.iterdir()}
            index = read_index(prefix.format(first.url.replace("//", "//user:pass%20word@")), "train")
            assert found(read_shard(index)) == expected(blocks)
            first.faults[NAME] = [faults.answer(503, "Busy")] * 9
            with pytest.raises(UserError, match=f"{NAME}.*: ") as error:
                list(read_shard(index))
            assert "user" not in str(error.value) and "word" not in str(error.value)
    assert {*first.passwords} == {"Basic dXNlcjpwYXNzIHdvcmQ="} and {*second.passwords} == {None}


SECRETS = [  # prefixes; {host} is a server that answers 403
    "http://me:SECRET@{host}/", "http://me:SEC/SECRET@{host}/", "http://me:SEC#SECRET?SECRET@{host}/",
    "http:/me:SECRET@{host}", "http://{host}/%s?X-Signature=SECRET" + "x" * 400 + "SECRET",
    "http://me:SECRET@127.0.0.1:99999999/", "http://me:SECRET@[::1/", "az://me:SECRET@b/", "nowhere://me:SECRET@b/",
    "pipe:TOKEN='a SECRET' false http://me:SECRET@{host}/", "pipe:curl -sf -H 'Token: SECRET' http://{host}/%s?key=SECRET",
    "pipe:TOKEN='SECRET false ",
]  # fmt: skip


@pytest.mark.parametrize("prefix", SECRETS)
def test_no_secret_of_a_prefix_is_in_a_message(blocks, tmp_path, prefix, capfd):
    """While an index is read and while shards are, by both scripts: one line. What the shell says is not ours."""
    with faults.fault_server(blocks) as server:
        shards = f"--shards={prefix.format(host=server.url.split('/')[2])}"
        server.faults = {path.name: [faults.answer(403, "Forbidden")] * 99 for path in blocks.glob("imagenet-train*")}
        for index in ([], [f"--index={blocks}"]):
            flags = [shards, *index, "--retry-for=0"]
            assert script.main([*flags, "--verify", "--workers=1", "--splits=train"]) == 1
            assert imagenet_train.main([*flags, "--accelerator=cpu", f"--preview={tmp_path}/x"]) == 1
            out, err = capfd.readouterr()
            assert "SECRET" not in out + err.replace("TOKEN='SECRET", "") and "Traceback" not in err
            assert err.count("imagenet_train.py: ") >= 2 and "Warning" not in err


@pytest.mark.quick
@pytest.mark.parametrize("main", [script.main, imagenet_train.main])
def test_no_word_of_an_unquoted_command_is_in_a_message(main, capsys):
    verify = ["--verify"] * (main == script.main)
    for words in (["-H", "Token: SECRET", "http://x"], ["--user=SECRET"], ["-uSECRET"], ["--cache=s3:/k:SECRET@b"]):
        with pytest.raises(SystemExit, match="2"):
            main(["--shards=pipe:curl", *verify, *words])
        assert "SECRET" not in (error := capsys.readouterr().err) and error.count("\n") == 1


def test_a_proxy_of_the_environment_is_used(blocks, monkeypatch):
    monkeypatch.delenv("no_proxy", raising=False)
    with faults.fault_server(blocks) as server:
        monkeypatch.setenv("http_proxy", server.url)
        assert found(read_shard(read_index("http://shards.example/", "train"))) == expected(blocks)


# ---------------------------------------------------------------- errors that pass, and errors that do not


@pytest.mark.parametrize("number", ["EIO", "ESTALE", "ETIMEDOUT", "EMFILE", "EINTR", "ENOENT", "EACCES", "EISDIR"])
def test_an_error_of_a_folder_is_final_only_if_it_cannot_pass(blocks, no_pauses, number, monkeypatch, capsys):
    """The first are those of network file systems. open() fails as it would: none of them can be made at will."""
    index, real, failed = read_index(str(blocks), "train"), open, []
    said = "no such file" if number == "ENOENT" else os.strerror(getattr(errno, number))

    def fail(path: str, *args, **options):
        if str(path).endswith(NAME) and len(failed) < 2:
            failed.append(path)
            raise OSError(getattr(errno, number), os.strerror(getattr(errno, number)), path)
        return real(path, *args, **options)

    monkeypatch.setattr("builtins.open", fail)
    if number in ("ENOENT", "EACCES", "EISDIR"):
        with pytest.raises(PermanentError, match=said):
            list(read_shard(index, retry_for=60))
    else:
        assert found(read_shard(index, retry_for=60)) == expected(blocks) and len(failed) == 2
        assert capsys.readouterr().err.count(said) == 2


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
    seconds = []
    monkeypatch.setattr(script, "retry", lambda read, duration: seconds.append(duration) or read())
    with pytest.raises(UserError):  # a wrong host shows soon
        read_index(f"http://127.0.0.1:{places.free_port()}/", "train", retry_for=300)
    assert seconds == [30]


def test_a_server_that_is_restarted_costs_nothing(unique, capfd):
    """Under the same port, some seconds after its end, while loader processes are reading."""
    port = places.free_port()
    with faults.fault_server(unique, port=port) as server:
        index = read_index(server.url, "val")
    with ExitStack() as stack:
        starting = threading.Timer(3, lambda: stack.enter_context(faults.fault_server(unique, port=port)))
        starting.start()
        assert labels_of(index, retry_for=60) == list(range(len(index.classes)))
        starting.join()
    assert capfd.readouterr().err.count("; next try in") >= 2


WRONG = {  # prefix: what is said; the last four are repeated, for as long as they might pass
    "http://127.0.0.1:99999999/": "[Pp]ort", "http://[::1/": "Invalid", "http:///data": "http:///data",
    "{url}nowhere/": "no such file; imagenet_shards.py makes it", "az://bucket/x": "az://bucket/.*adlfs",
    "nowhere://x": "nowhere", "/nowhere": "/nowhere/imagenet-train.json: no such file", "\udcff": "no such file",
    "http:/host/data": "http:/host/data/.*no such file", "pipe:true ": "expected an index, found b''",
    "http://no-such-host.invalid/": "no-such-host", "{url}loop/": "TooManyRedirects",
    "pipe:no-such-command ": "exit status 127", "pipe:curl -sf {url}nowhere/": "exit status 22",
}  # fmt: skip


@pytest.mark.parametrize("prefix", WRONG)
def test_a_wrong_prefix_is_one_line(blocks, prefix, no_pauses, capsys):
    final = prefix in list(WRONG)[:-4]
    with faults.fault_server(blocks) as server:
        server.faults["loop/imagenet-train.json"] = [faults.redirect(server.url + "loop/")] * 999
        with pytest.raises(UserError, match=WRONG[prefix]) as error:
            read_index(prefix.format(url=server.url), "train", retry_for=60 if final else 0.5)
    assert (capsys.readouterr().err == "") == final and "\n" not in str(error.value)


# ---------------------------------------------------------------- commands end


@pytest.mark.parametrize("command", ["sleep 100; cat {f}/%s", "(head -c 9000; sleep 100) < {f}/%s"])
def test_a_command_that_stalls_is_ended(blocks, tmp_path, command):
    index = index_at(blocks, f"pipe:echo $$ >{tmp_path}/pid; " + command.format(f=blocks))
    with pytest.raises(UserError, match=r"no byte for 1\.5 s"):
        list(read_shard(index, timeout=1.5))
    assert ended(group(int((tmp_path / "pid").read_text())))


@pytest.mark.parametrize("stop", [3, 7])
def test_a_reader_that_ends_early_ends_its_command_in_silence(blocks, tmp_path, capfd, stop):
    """And all that the command started, which is its process group; also while it stalls for the next block."""
    slow = f"pipe:echo $$ > {tmp_path}/pid; cat {blocks}/%s | (head -c 170000; sleep 300; exit 5)"
    samples = read_shard(index_at(blocks, slow), 0, stop, timeout=300)
    assert len([next(samples) for _ in range(3)]) == 3
    del samples
    assert ended(group(int((tmp_path / "pid").read_text()))) and capfd.readouterr().err == ""


def test_close_ends_a_stalled_read():
    source, errors = open_source("pipe:sleep 300; echo ", 300), []

    def read() -> None:
        try:
            source.read("x")
        except UserError as error:
            errors.append(str(error))

    reader = threading.Thread(target=read)
    reader.start()
    while not source.process:
        time.sleep(0.01)
    source.close()
    reader.join(60)
    assert errors and "exit status -9" in errors[0] and ended(group(source.process.pid))


def test_a_slow_reader_is_not_a_stalled_command(blocks):
    got = []
    for sample in read_shard(index_at(blocks, f"pipe:cat {blocks}/"), timeout=1):
        time.sleep(0.3)
        got.append(sample)
    assert found(got) == expected(blocks)


@pytest.mark.parametrize("where", ["index", "loader process"])
def test_a_killed_main_process_leaves_no_command_behind(blocks, where):
    """Killed while it, or its loader process, reads by a command that stalls and ignores all that can be ignored."""
    prefix = f"pipe:trap '' TERM HUP INT PIPE; (sleep 1000) | cat {blocks}/%s -"
    index = read_index(str(blocks), "train")

    def work() -> None:
        if where == "index":
            read_index(prefix, "train", timeout=100)
        labels_of(at(index, prefix.replace(str(blocks), "/nowhere")), 1, timeout=100)

    pids = killed(lambda started: len(started) >= 3 + (where != "index"), work)
    assert ended(pids)
