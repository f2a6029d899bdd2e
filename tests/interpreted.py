"""What makes Triton's interpreter faster, and is not seen by what it interprets."""

from __future__ import annotations

from typing import Any

LARGE = 4096, 1024
"""Elements of a tile and of a masked one where kernels are not the matter: what takes the interpreter's time
is the number of operations, not their size. Each tensor of 8-bit state has whole tiles still."""


def replace_language_once() -> None:
    """At each launch, and at each call of another function by a kernel, the interpreter looks through
    ``triton.language`` for what it has to replace there: half of its time. Here it does so once, for good."""
    import triton.language as tl
    from triton.runtime import interpreter

    languages, replaced = (tl, tl.core), set[str]()
    replace = interpreter._patch_lang

    def replace_once(function: Any) -> Any:
        seen = function.__globals__.values()
        names = {language.__name__ for language in languages if any(one is language for one in seen)}
        if not names <= replaced:
            replace(function)  # what would put it back is dropped
            replaced.update(names)
        return interpreter._LangPatchScope()

    if hasattr(interpreter, "_LangPatchScope"):  # older ones put nothing back, and are not worth the trouble
        interpreter._patch_lang = replace_once
