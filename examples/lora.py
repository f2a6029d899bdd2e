"""LoRA with PEFT: the base stays as it is, adapters learn.

python examples/lora.py                                       # a tiny model, also on a CPU
python examples/lora.py --model meta-llama/Llama-3.2-3B --length 2048 --rows 1
"""

import argparse
from typing import Any

from model_and_text import batches, load
from peft import LoraConfig, get_peft_model

import adamw_triton

ADAPTERS = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")


def train(model: Any, name: str | None, steps: int, rows: int, length: int) -> None:
    model.train()
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = adamw_triton.AdamW(trained, lr=2e-4 if name else 1e-2, max_grad_norm=1.0, nonfinite="skip")
    text = batches(name, rows, length)
    for step in range(steps):
        loss = model(**next(text)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.4f}, gradients' norm {optimizer.grad_norm.item():.3f}")
    print(f"{sum(param.numel() for param in trained):,} parameters trained; state: {optimizer.memory()}")


def options(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", help="name or folder of a causal language model (default: a tiny one)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=8, help="sequences at a time")
    parser.add_argument("--length", type=int, default=64, help="tokens of a sequence")
    return parser.parse_args()


if __name__ == "__main__":
    given = options("train LoRA adapters")
    train(get_peft_model(load(given.model), ADAPTERS), given.model, given.steps, given.rows, given.length)
