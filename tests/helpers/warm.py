"""A stand-in for python3 that takes no time to import PyTorch: scripts run in forks of an interpreter that has done so.

A new interpreter takes 5 s of CPU before imagenet_train.py begins. python() starts one, without anything of the tests,
and returns a program for `PROGRAM [-u] script.py …` and `PROGRAM -m module …`. Arguments, folder, environment, output,
signals and exit status are the script's. torchrun and Lightning start their ranks with it too: it is sys.executable.
The script is no child of the program and not in its session. With other options a new interpreter starts.
"""

import functools
import gc
import json
import os
import select
import signal
import socket
import sys
from pathlib import Path

if sys.argv[1:2] != ["ask"]:  # which starts at once
    import atexit
    import multiprocessing
    import random
    import runpy
    import subprocess
    import tempfile
    from multiprocessing.connection import wait

TOP = Path(__file__).parents[2]


@functools.cache
def start() -> "tuple[tempfile.TemporaryDirectory, subprocess.Popen]":
    """The folder of the program and its socket, which ends with this process, and the interpreter, which does too."""
    folder = tempfile.TemporaryDirectory()
    program, address = Path(folder.name, "python3"), f"{folder.name}/socket"
    words = [sys.executable, "-u", __file__, "serve", address, str(program)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, start_new_session=True)
    assert server.stdout.readline() == b"ready\n"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -IS {__file__} ask {address} "$@"\n')
    program.chmod(0o755)
    return folder, server


def python() -> str:
    """The program's path."""
    return f"{start()[0].name}/python3"


def ask(address: str, *arguments: str) -> None:
    """The stand-in: let the server run a script, pass signals on to it, and end as it did."""
    arguments = arguments[arguments[:1] == ("-u",) :]
    if not arguments or (arguments[0][0] == "-" and arguments[0] != "-m"):
        os.execv(sys.executable, [sys.executable, *arguments])
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        socket.send_fds(server, [b" "], [0, 1, 2])
        server.sendall(json.dumps([arguments, os.getcwd(), dict(os.environ)]).encode() + b"\n")
        answers = server.makefile()
        pid = int(answers.readline())
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, lambda number, frame: os.kill(pid, number))
        status = int(answers.readline() or 1)
    if status < 0:
        signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
        os.kill(os.getpid(), -status)
    os._exit(status)


def run_script(program: str, arguments: list[str], where: str, env: dict[str, str], descriptors: list[int]) -> None:
    """In a fork: what Python does with these arguments."""
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(where)
    os.environ.clear()
    os.environ.update(env)
    random.seed()
    sys.executable = program
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=stream is sys.stderr or stream.isatty())
    atexit._clear()
    try:
        if arguments[0] == "-m":
            sys.argv, sys.path[0] = arguments[1:], where
            sys.modules.pop(sys.argv[0], None)
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = arguments, str(Path(arguments[0]).absolute().parent)
            runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out


def attend(client: socket.socket, program: str) -> None:
    """In a fork: run a client's script in another fork. It is killed when the client ends first."""
    _, descriptors, *_ = socket.recv_fds(client, 1, 3)
    arguments, where, env = json.loads(client.makefile().readline())
    fork = multiprocessing.get_context("fork")
    script = fork.Process(target=run_script, args=(program, arguments, where, env, descriptors))
    script.start()
    for descriptor in (0, 1, *descriptors):
        os.close(descriptor)
    client.sendall(f"{script.pid}\n".encode())
    if client in wait([script.sentinel, client]):
        script.kill()
        script.join()
    else:
        script.join()
        client.sendall(f"{script.exitcode}\n".encode())
    os._exit(0)


def serve(address: str, program: str) -> None:
    sys.path.insert(0, str(TOP))
    import torch.distributed.run  # noqa: F401

    import imagenet_train  # noqa: F401

    sys.path.remove(str(TOP))
    del sys.modules["imagenet_train"]  # each script imports its own
    gc.freeze()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(64)
        print("ready", flush=True)
        while True:
            ready, _, _ = select.select([listener, 0], [], [])
            if 0 in ready:
                return
            client, _ = listener.accept()
            if not os.fork():
                listener.close()
                return attend(client, program)
            client.close()
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


if __name__ == "__main__":
    {"ask": ask, "serve": serve}[sys.argv[1]](*sys.argv[2:])
