"""What a spawned process runs. It knows nothing of our names until it unpickles one."""

from typing import Any


def variant_in_the_child(args: Any, queue: Any) -> None:
    from transformers import Trainer

    queue.put(Trainer.get_optimizer_cls_and_kwargs(args)[1]["variant"])
