"""``python -m bench wheels``: fetch the peers' wheels into .whl/, for a GPU machine without network.

There ``python -m bench prove`` installs them for its own processes. The peers need nothing but torch, Triton,
numpy and packaging, which are left as they are there; what else that machine lacks (pytest, pytest-xdist,
hypothesis, numpy, rich, matplotlib, transformers) is named as an argument, and fetched without what it needs
in turn.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PEERS = ("bitsandbytes", "torchao", "flashoptim", "torch-optimi")
LIMIT = 64 << 20
"""Bytes that may travel to the machine."""
FOLDER = Path(__file__).parents[1] / ".whl"


def main(argv: Sequence[str]) -> int:
    """Fetch; 1 if they are more than may travel."""
    parser = argparse.ArgumentParser(prog="python -m bench wheels", description=__doc__.split("\n")[0])
    parser.add_argument("--python", default="3.12", help="of the machine")
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("also", nargs="*", metavar="PACKAGE", help="what else that machine lacks")
    options = parser.parse_args(argv)
    # Newest last; pip takes whichever of these a wheel is tagged with.
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in (17, 24, 28)] + ["manylinux2014_x86_64"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--implementation", "cp", "--python-version", options.python, "--dest", str(options.out)]
    for platform in platforms:
        command += ["--platform", platform]
    code = subprocess.run([*command, *PEERS, *options.also], check=False).returncode
    if code != 0:
        return code
    wheels = sorted(options.out.glob("*.whl"))
    total = sum(wheel.stat().st_size for wheel in wheels)
    for wheel in wheels:
        print(f"{wheel.stat().st_size / 2**20:6.1f} MiB  {wheel.name}")
    print(f"{total / 2**20:6.1f} MiB in all, of at most {LIMIT >> 20} MiB\n")
    print("on the machine, in a copy of this folder, .whl/ included: python3 -m bench prove")
    return int(total > LIMIT)
