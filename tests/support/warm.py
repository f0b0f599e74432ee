"""A Python that has imported the slow packages already: what it runs starts in a tenth of the time.

A script of the product takes about five seconds of CPU to import torch and transformers, and the
tests start several dozens. So each test process keeps one server that has imported them. `python()`
names a small program that takes the command line of Python (a script, -m or -c), has the server
fork, and stands for the fork: it passes on streams, folder, environment, signals and exit code.

Of the project nothing is imported beforehand, so that copies of the tree run their own modules.
What a test is about itself (signals of a terminal, limits, how fast --help is, a machine without
Triton, TRITON_INTERPRET=1) starts a fresh sys.executable instead, as does everything but Linux.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

# What the scripts import, and what takes long.
SLOW = (
    "ijson",
    "jinja2",
    "pydantic",
    "safetensors.torch",
    "torch.distributed.fsdp",
    "torch.distributed.launcher.api",
    "torch.nn.attention.bias",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl",
    "tyro",
)

# Without `site`, which alone takes longer than all of this.
CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect("{address}")
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: server.send(bytes([number])))
request = dict(argv=sys.argv[1:], folder=os.getcwd(), environment=dict(os.environ))
socket.send_fds(server, [b"0"], [0, 1, 2])
server.sendall(json.dumps(request).encode() + b"\\n")
code = int(server.recv(8) or b"1")
if code < 0:
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


@functools.cache
def python() -> str:
    """Return the program's path; start this process's server when it is asked for first."""
    if not hasattr(os, "pidfd_open"):
        return sys.executable
    folder = tempfile.TemporaryDirectory(prefix="warm")
    address = Path(folder.name) / "socket"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    server = subprocess.Popen(
        [sys.executable, __file__, str(address)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # Ctrl-C is for the tests.
        start_new_session=True,
    )
    assert server.stdout.readline() == b"ready\n"
    client = Path(folder.name) / "python"
    client.write_text(CLIENT.format(python=sys.executable, address=address))
    client.chmod(0o700)

    def end():
        server.stdin.close()
        server.wait()
        folder.cleanup()

    atexit.register(end)
    return str(client)


# ---- The server


def serve(address: str) -> None:
    """Fork for each client, until the test process closes our stdin."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    for name in SLOW:
        importlib.import_module(name)
    # The collector need not walk through torch at each fork's end.
    gc.freeze()
    os.write(1, b"ready\n")
    while True:
        ready, _, _ = select.select([listener, 0], [], [])
        # Keepers that have ended.
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if 0 in ready:
            return
        client, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            keep(client, address)
            return
        client.close()


def keep(client: socket.socket, address: str) -> None:
    """Run a client's command in a fork, and tell the client how it ended."""
    _, streams, _, _ = socket.recv_fds(client, 1, 3)
    with client.makefile() as words:
        request = json.loads(words.readline())
    child = os.fork()
    if child == 0:
        client.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        # torchrun starts its ranks with it.
        request["environment"]["PYTHON_EXEC"] = str(Path(address).with_name("python"))
        return run(**request)
    for stream in streams:
        os.close(stream)
    ended = os.pidfd_open(child)
    while ended not in select.select([client, ended], [], [])[0]:
        # A client that was killed takes its command along.
        (number,) = client.recv(1) or [signal.SIGKILL]
        os.kill(child, number)
    _, status = os.waitpid(child, 0)
    # Nobody listens any more, if the client was killed.
    with suppress(BrokenPipeError):
        client.send(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def run(argv: list[str], folder: str, environment: dict[str, str]) -> None:
    """Do what `python ARGV` does in that folder and environment."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if argv[0] == "-u":
        argv = argv[1:]
        sys.stdout.reconfigure(write_through=True)
    # In the place of this file's own folder.
    sys.path[:1] = filter(None, environment.get("PYTHONPATH", "").split(":"))
    if argv[0] == "-c":
        sys.argv = ["-c", *argv[2:]]
        sys.path.insert(0, "")
        exec(compile(argv[1], "<string>", "exec"), {"__name__": "__main__"})
    elif argv[0] == "-m":
        sys.argv = argv[1:]
        sys.path.insert(0, folder)
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        sys.path.insert(0, str(Path(argv[0]).resolve().parent))
        runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    serve(sys.argv[1])
