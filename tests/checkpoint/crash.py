"""Runs that are killed at random moments: a program, since only processes can be killed.

It imports torch once, and forks a child for each attempt. A child trains from the last checkpoint on and
saves after every step; it is killed by SIGKILL somewhere in between, until the number of kills is reached,
and the last one comes to its end. Prints one JSON line for each combination.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import Parameter

from adamw_triton import AdamW
from adamw_triton.checkpoint.files import replacing
from tests.optimizer.problems import DTYPES, bits, parameters, set_grads, state_bits

VARIANTS = ("32bit", "8bit", "paged_32bit", "paged_8bit")
STEPS = 12
IN_MEMORY = Path("/dev/shm")  # waiting for a disk would take most of the time, and shows nothing more
SHAPES = ((90, 70), (5000,), (3,), (40, 2, 60))


def train(folder: Path, variant: str, dtype: torch.dtype) -> None:
    """To the end, from the last checkpoint if there is one."""
    params = parameters(SHAPES, dtype)
    optimizer = AdamW(params, lr=1e-2, variant=variant)
    checkpoint = folder / "checkpoint.pt"
    done = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        done = saved["step"]
        for param, value in zip(params, saved["params"], strict=True):
            param.data.copy_(value)
        optimizer.load_state_dict(saved["optimizer"])
    for step in range(done + 1, STEPS + 1):
        set_grads(params, step)
        for param in params:
            assert param.grad is not None
            param.grad.add_(param.detach(), alpha=0.1)  # so that what is wrong stays wrong
        optimizer.step()
        values = [param.detach() for param in params]
        with replacing(checkpoint) as temporary:
            torch.save({"step": step, "params": values, "optimizer": optimizer.state_dict()}, temporary)


def result(folder: Path, variant: str, dtype: torch.dtype) -> list[bytes]:
    """The bits of the last checkpoint: parameters, then state."""
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    optimizer = AdamW([Parameter(value) for value in saved["params"]], variant=variant)
    optimizer.load_state_dict(saved["optimizer"])
    state = [entry[key] for entry in state_bits(optimizer) for key in sorted(entry)]
    return [str(saved["step"]).encode(), *bits(saved["params"]), *state]


def fork(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return pid


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_and_resume(variant: str, dtype: torch.dtype, kills: int, rng: random.Random) -> dict[str, object]:
    with tempfile.TemporaryDirectory(dir=IN_MEMORY if IN_MEMORY.is_dir() else None) as name:
        whole, folder = Path(name, "whole"), Path(name, "killed")
        whole.mkdir()
        folder.mkdir()
        begin = time.perf_counter()
        assert wait(fork(lambda: train(whole, variant, dtype))) == 0
        seconds = time.perf_counter() - begin
        expected = result(whole, variant, dtype)
        killed = while_saving = runs = equal = 0
        while killed < kills or runs == 0:
            pid = fork(lambda: train(folder, variant, dtype))
            if killed < kills:
                time.sleep(rng.uniform(0, seconds))
                os.kill(pid, signal.SIGKILL)
            code = wait(pid)
            if code == -signal.SIGKILL:
                killed += 1
                left = list(folder.glob(".*.tmp"))
                while_saving += bool(left)
                for file in left:
                    file.unlink()
            else:
                assert code == 0, f"a child gave {code}"
                runs += 1
                equal += result(folder, variant, dtype) == expected
                (folder / "checkpoint.pt").unlink()
        if (folder / "checkpoint.pt").exists():  # the last kill came before an end
            assert wait(fork(lambda: train(folder, variant, dtype))) == 0
            runs += 1
            equal += result(folder, variant, dtype) == expected
        counts = {"kills": killed, "while_saving": while_saving, "runs": runs, "equal": equal}
        return {"variant": variant, "dtype": str(dtype), **counts}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kills", type=int, help="of each combination of variant and dtype")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a forked child has no other threads
    with tempfile.TemporaryDirectory() as folder:  # torch imports much at its first step
        train(Path(folder), "8bit", torch.float32)
    rng = random.Random(arguments.seed)
    for variant, dtype in itertools.product(VARIANTS, DTYPES):
        print(json.dumps(kill_and_resume(variant, dtype, arguments.kills, rng)), flush=True)


if __name__ == "__main__":
    main()
