"""``python -m adamw_triton.huggingface train.py --optim adamw_triton_8bit ...``: any training script,
unchanged, with our optimizers registered. ``-m`` before the script's name runs a module; ``torchrun -m``
and ``accelerate launch -m`` start this one like any other."""

import runpy
import sys
from pathlib import Path

USAGE = """\
usage: python -m adamw_triton.huggingface (SCRIPT.py | -m MODULE) [ARGUMENT ...]

runs a training script, or a module; its --optim knows adamw_triton, adamw_triton_8bit, ..."""


def main() -> None:
    """Run the script or module that the command line names as Python itself would."""
    arguments = sys.argv[1:]
    if arguments[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return
    as_module = arguments[:1] == ["-m"]
    arguments = arguments[as_module:]
    if not arguments or arguments[0].startswith("-"):
        print(USAGE, file=sys.stderr)
        raise SystemExit(2)
    sys.argv = arguments
    if as_module:
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(arguments[0]).resolve().parent)
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main()
