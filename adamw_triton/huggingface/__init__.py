"""Importing this registers our optimizers with transformers.

    import adamw_triton.huggingface

    args = TrainingArguments(..., optim="paged_adamw_triton_8bit", optim_args="memory_budget=4GiB")

``optim=`` then knows ``adamw_triton``, ``adamw_triton_32bit``, ``adamw_triton_8bit``,
``paged_adamw_triton_32bit`` and ``paged_adamw_triton_8bit``, in Python, on command lines and in files.
Import it before an ``HfArgumentParser`` is made. A script that does not import it:
``python -m adamw_triton.huggingface train.py --optim adamw_triton_8bit ...``.

Raises:
    ImportError: transformers is missing, or not one whose optimizers can be extended.
"""

from adamw_triton.huggingface.registration import register

register()

from adamw_triton.huggingface.callback import ReportCallback  # noqa: E402
from adamw_triton.trainer_arguments import OPTIMIZERS, optimizer_cls_and_kwargs  # noqa: E402

__all__ = ["OPTIMIZERS", "ReportCallback", "optimizer_cls_and_kwargs", "register"]
