"""Published config.json files, shortened to what tells the weights, and the parameters of what is published.

The numbers are those of the files' metadata on the Hugging Face Hub, tied heads once and buffers not at all.
"""

from __future__ import annotations

from typing import Any

_LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip

FULL: dict[str, tuple[dict[str, Any], int]] = {
    "Qwen3-30B-A3B": ({
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "head_dim": 128,
        "hidden_size": 2048,
        "intermediate_size": 6144, "moe_intermediate_size": 768, "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "vocab_size": 151936,
        "tie_word_embeddings": False, "decoder_sparse_step": 1, "mlp_only_layers": [],
    }, 30_532_122_624),
    "Mixtral-8x7B": ({
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 4096,
        "intermediate_size": 14336, "num_attention_heads": 32, "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8, "num_local_experts": 8, "vocab_size": 32000, "tie_word_embeddings": False,
    }, 46_702_792_704),
    "gemma-3-4b": ({
        "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3",
        "mm_tokens_per_image": 256,
        "text_config": {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
                        "num_hidden_layers": 34, "sliding_window": 1024, "vocab_size": 262208},
        "vision_config": {"hidden_size": 1152, "image_size": 896, "intermediate_size": 4304, "patch_size": 14,
                          "model_type": "siglip_vision_model", "num_attention_heads": 16,
                          "num_hidden_layers": 27,
                          "vision_use_head": False},
    }, 4_300_079_472),
    "gpt2": ({
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768,
        "n_head": 12,
        "n_layer": 12, "n_positions": 1024, "vocab_size": 50257,
    }, 124_439_808),
    "t5-small": ({
        "architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "d_ff": 2048, "d_kv": 64,
        "d_model": 512, "num_heads": 8, "num_layers": 6, "vocab_size": 32128, "is_encoder_decoder": True,
    }, 60_506_624),
    "bert-base-uncased": ({
        "architectures": ["BertForMaskedLM"], "model_type": "bert", "hidden_size": 768,
        "intermediate_size": 3072,
        "max_position_embeddings": 512, "num_attention_heads": 12, "num_hidden_layers": 12,
        "type_vocab_size": 2,
        "vocab_size": 30522,
    }, 109_514_298),
    "whisper-tiny": ({
        "architectures": ["WhisperForConditionalGeneration"], "model_type": "whisper", "d_model": 384,
        "decoder_attention_heads": 6, "decoder_ffn_dim": 1536, "decoder_layers": 4,
        "encoder_attention_heads": 6,
        "encoder_ffn_dim": 1536, "encoder_layers": 4, "is_encoder_decoder": True,
        "max_source_positions": 1500,
        "max_target_positions": 448, "num_mel_bins": 80, "vocab_size": 51865,
    }, 37_760_640),
    "mamba-130m": ({
        "architectures": ["MambaForCausalLM"], "model_type": "mamba", "hidden_size": 768,
        "num_hidden_layers": 24,
        "state_size": 16, "expand": 2, "intermediate_size": 1536, "time_step_rank": 48, "vocab_size": 50280,
    }, 129_135_360),
    "Qwen2.5-VL-3B": ({
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl",
        "hidden_size": 2048,
        "intermediate_size": 11008, "num_attention_heads": 16, "num_hidden_layers": 36,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True, "vocab_size": 151936,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vision_config": {"depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420,
                          "num_heads": 16, "in_chans": 3, "out_hidden_size": 2048, "patch_size": 14,
                          "spatial_merge_size": 2, "window_size": 112, "temporal_patch_size": 2,
                          "fullatt_block_indexes": [7, 15, 23, 31]},
    }, 3_754_622_976),
    "llava-1.5-7b": ({
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "image_token_index": 32000,
        "text_config": {"_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"],
                        "max_position_embeddings": 4096, "model_type": "llama", "vocab_size": 32064},
        "vision_config": {"hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "patch_size": 14,
                          "model_type": "clip_vision_model", "num_attention_heads": 16,
                          "num_hidden_layers": 24,
                          "projection_dim": 768, "vocab_size": 32000},
    }, 7_063_427_072),
    "bloom-560m": ({
        "architectures": ["BloomForCausalLM"], "model_type": "bloom", "n_embed": 1024, "n_layer": 24,
        "num_attention_heads": 16, "vocab_size": 250880,
    }, 559_214_592),
    "opt-125m": ({
        "architectures": ["OPTForCausalLM"], "model_type": "opt", "ffn_dim": 3072, "hidden_size": 768,
        "num_attention_heads": 12, "num_hidden_layers": 12, "vocab_size": 50272, "word_embed_proj_dim": 768,
    }, 125_239_296),
    "pythia-70m": ({
        "architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "hidden_size": 512,
        "intermediate_size": 2048, "num_attention_heads": 8, "num_hidden_layers": 6, "vocab_size": 50304,
        "tie_word_embeddings": False,
    }, 70_426_624),
    "roberta-base": ({
        "architectures": ["RobertaForMaskedLM"], "model_type": "roberta", "hidden_size": 768,
        "intermediate_size": 3072, "max_position_embeddings": 514, "num_attention_heads": 12,
        "num_hidden_layers": 12, "type_vocab_size": 1, "vocab_size": 50265,
    }, 124_697_433),
    "Llama-3-8B": (_LLAMA_8B, 8_030_261_248),
    "a reward model of it": (
        _LLAMA_8B | {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}},
        7_504_928_768,
    ),
    "an embedding model of it": (_LLAMA_8B | {"architectures": ["LlamaModel"]}, 7_504_924_672),
}  # fmt: skip
