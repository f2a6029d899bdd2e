"""QLoRA: adapters on a base in 4 bits, which bitsandbytes keeps.

python examples/qlora.py                                      # a tiny model, also on a CPU
python examples/qlora.py --model meta-llama/Llama-3.1-8B --length 2048 --rows 1
"""

import torch
from lora import ADAPTERS, options, train
from model_and_text import load
from peft import get_peft_model, prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig

QUANTIZED = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
)

if __name__ == "__main__":
    given = options("train LoRA adapters on a base in 4 bits")
    base = prepare_model_for_kbit_training(load(given.model, quantization_config=QUANTIZED))
    train(get_peft_model(base, ADAPTERS), given.model, given.steps, given.rows, given.length)
