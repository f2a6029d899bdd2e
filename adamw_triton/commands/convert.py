"""`adamw-triton convert`: a checkpoint of an AdamW's state from one form to another, or its exact weights."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from adamw_triton.commands import fail
from adamw_triton.installing import missing

# The extra "convert" of pyproject.toml.
PACKAGES = ("rich", "safetensors", "numpy")

SUMMARY = "convert a checkpoint of an AdamW's state: ours, torch's, bitsandbytes' or torchao's"
FORMS = {
    "native": "8-bit state in our codes, other state in fp32",
    "portable": "all of it in fp32 under torch.optim.AdamW's names",
    "torch": "that, with torch.optim.AdamW's groups",
    "master": "the model's weights, in fp32 where the state keeps them exactly; IN is a Trainer's checkpoint "
    "folder, with weights and optimizer.pt, and OUT a .safetensors file",
}


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The sub-command `convert`."""
    parser = commands.add_parser("convert", help=SUMMARY, description=SUMMARY)
    parser.set_defaults(run=convert)
    source_help = (
        "a state_dict that torch.save wrote, or a .safetensors file of ours; a folder for --to master"
    )
    parser.add_argument("source", metavar="IN", type=Path, help=source_help)
    parser.add_argument(
        "target",
        metavar="OUT",
        type=Path,
        help="a .safetensors file, or torch.save's: .pt, .pth, .bin, .ckpt",
    )
    parser.add_argument("--force", action="store_true", help="write over OUT, if it is there")
    explained = "; ".join(f"{form}: {meaning}" for form, meaning in FORMS.items())
    parser.add_argument("--to", required=True, choices=tuple(FORMS), help=explained)


def convert(arguments: argparse.Namespace) -> int:
    """Convert; the exit code."""
    if arguments.target.is_file() and not arguments.force:
        return fail("convert", f"{arguments.target} is there already: give --force to write over it")
    from adamw_triton import architectures
    from adamw_triton.checkpoint import conversion, exporting
    from adamw_triton.checkpoint.files import CheckpointError

    try:
        from rich.console import Console
        from rich.progress import track

        bar = partial(track, description=arguments.source.name, console=Console(stderr=True))
        if arguments.to == "master":
            print(exporting.export(arguments.source, arguments.target, architectures.orders, bar))
        else:
            print(conversion.convert(arguments.source, arguments.target, arguments.to, bar))
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package not in PACKAGES:
            raise
        return fail("convert", missing(package, "convert"))
    except (CheckpointError, OSError, MemoryError) as error:
        return fail("convert", str(error) or type(error).__name__)
    return 0
