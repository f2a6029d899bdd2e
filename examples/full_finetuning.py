"""All weights of a model, on a card that its gradients would fill: they are used up while backward runs, and
those of several micro-batches add up in host memory. bf16 weights are kept exactly.

    python examples/full_finetuning.py                                        # a tiny model, also on a CPU
    python examples/full_finetuning.py --model meta-llama/Llama-3.1-8B --length 2048 --rows 1
"""

import argparse

from model_and_text import batches, load

import adamw_triton


def main(name: str | None, steps: int, micro_batches: int, rows: int, length: int) -> None:
    model = load(name)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    optimizer = adamw_triton.AdamW(
        model.named_parameters(), lr=1e-5 if name else 3e-3,
        gradient_release=True, accumulate_on="host", adaptive_clip=1.05,
    )  # fmt: skip
    text = batches(name, rows, length)
    for step in range(steps):
        with optimizer.accumulating():  # all backwards but the last
            for _ in range(micro_batches - 1):
                (model(**next(text)).loss / micro_batches).backward()
        loss = model(**next(text)).loss
        (loss / micro_batches).backward()  # parameters are stepped in here
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.4f}")
    print(optimizer.plan)
    print(optimizer.memory())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="fine-tune all weights, gradients released")
    parser.add_argument("--model", help="name or folder of a causal language model (default: a tiny one)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--micro-batches", type=int, default=2)
    parser.add_argument("--rows", type=int, default=8, help="sequences of a micro-batch")
    parser.add_argument("--length", type=int, default=64, help="tokens of a sequence")
    arguments = parser.parse_args()
    main(arguments.model, arguments.steps, arguments.micro_batches, arguments.rows, arguments.length)
