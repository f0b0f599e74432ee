"""Start the product's own commands, each in a process of its own."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import warm

ROOT = Path(__file__).parents[2]
TIMEOUT = 300  # seconds; then something hangs
QUIET = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}


def start(*command, fresh: bool = False, **environment: str) -> subprocess.Popen:
    """Start `python COMMAND` on the CPU with one thread; `finish` waits for it.

    fresh: as a user does, with nothing imported beforehand. With TRITON_INTERPRET=1 it always is:
    Triton asks for that while it is imported.
    """
    fresh = fresh or environment.get("TRITON_INTERPRET") == "1"
    return subprocess.Popen(
        [sys.executable if fresh else warm.python(), *map(str, command)],
        cwd=ROOT,
        env=os.environ | QUIET | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finish(*processes: subprocess.Popen) -> None:
    """Wait for all of them; fail with the words of the first that failed."""

    def read(process: subprocess.Popen) -> str:
        try:
            return process.communicate(timeout=TIMEOUT)[0]
        finally:
            process.terminate()  # torchrun takes its ranks along

    with ThreadPoolExecutor(len(processes)) as pool:  # at once: nobody has to wait for a full pipe
        words = list(pool.map(read, processes))
    for process, said in zip(processes, words, strict=True):
        assert process.returncode == 0, said[-4000:]


def flags(options: dict) -> list[str]:
    """{"lr": 1e-3} -> ["--lr", "0.001"]."""
    out = []
    for name, value in options.items():
        out += [f"--{name.replace('_', '-')}", str(value)]
    return out


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
