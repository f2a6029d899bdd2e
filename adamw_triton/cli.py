"""The command line: `adamw-triton`, or `python -m adamw_triton`."""

import argparse
import os
import sys
from collections.abc import Sequence

from adamw_triton._version import __version__
from adamw_triton.commands import bug_report, convert, doctor, fail, plan
from adamw_triton.demo import OPTIMIZERS, STEPS, DemoError
from adamw_triton.installing import missing

INTERRUPTED = 130

# The extra "demo" of pyproject.toml.
DEMO_PACKAGES = ("rich", "matplotlib")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in `argv` (default: the process's own arguments); the exit code."""
    arguments = build_parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def build_parser() -> argparse.ArgumentParser:
    """The grammar of the command line; each sub-command's function is its `run`."""
    parser = argparse.ArgumentParser(
        prog="adamw-triton", description="AdamW with 32-bit or blockwise 8-bit state, in Triton kernels."
    )
    parser.add_argument("--version", action="version", version=f"adamw-triton {__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)
    add_demo(commands)
    plan.add(commands)
    doctor.add(commands)
    convert.add(commands)
    bug_report.add(commands)
    return parser


def add_demo(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The sub-command `demo`."""
    summary = "train a small transformer on real text with each optimizer; table and loss curves"
    parser = commands.add_parser("demo", help=summary, description=summary)
    parser.set_defaults(run=demo)
    parser.add_argument("--steps", type=int, default=STEPS, help="per optimizer (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: %(default)s)")
    parser.add_argument("--out", default="loss.png", help="picture of the curves (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: the GPU where there is one)")
    parser.add_argument(
        "--variants",
        nargs="+",
        default=OPTIMIZERS,
        metavar="NAME",
        help=f"some of: {' '.join(OPTIMIZERS)} (default: all)",
    )


def demo(arguments: argparse.Namespace) -> int:
    """Run the demo; the exit code."""
    try:
        from adamw_triton.demo.run import run_demo
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package not in DEMO_PACKAGES:
            raise
        return fail("demo", missing(package, "demo"))
    try:
        run_demo(arguments.steps, arguments.seed, arguments.out, arguments.variants, arguments.device)
    except DemoError as error:
        return fail("demo", str(error))
    return 0
