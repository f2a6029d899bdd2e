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
import zipfile
from collections.abc import Sequence
from email import message_from_bytes
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PEERS = ("bitsandbytes", "torchao", "flashoptim", "torch-optimi")
THERE = ("torch", "triton", "numpy", "packaging")
"""With which the machine is expected."""
LIMIT = 64 << 20
"""Bytes that may travel to the machine."""
FOLDER = Path(__file__).parents[1] / ".whl"


def unmet(wheels: Sequence[Path]) -> set[tuple[str, str]]:
    """(wheel, requirement) where that is neither another of the wheels nor ``THERE``."""
    required: dict[str, list[Requirement]] = {}
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as file:
            name = next(name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
            metadata = message_from_bytes(file.read(name))
        needs = map(Requirement, metadata.get_all("Requires-Dist", []))
        required[canonicalize_name(metadata["Name"])] = [
            need for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})
        ]
    there = {*THERE, *required}
    return {
        (name, str(need))
        for name, needs in required.items()
        for need in needs
        if canonicalize_name(need.name) not in there
    }


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
    for wheel, need in sorted(unmet(wheels)):
        print(f"{wheel} needs {need}: name it as an argument, unless it is on that machine")
    print("on the machine, in a copy of this folder, .whl/ included: python3 -m bench prove")
    return int(total > LIMIT)
