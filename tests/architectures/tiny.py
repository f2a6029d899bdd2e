"""Small configs of many architectures, as their config.json says them."""

from __future__ import annotations

from typing import Any

DECODER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT2 = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 96,
    "n_positions": 24,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
          "image_size": 28, "patch_size": 14}  # fmt: skip
SEQ2SEQ = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "vocab_size": 96,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 96}


def _of(kind: str, cls: str, sizes: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"model_type": kind, "architectures": [cls], **sizes, **more}


_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
TINY = {
    "llama": _of("llama", "LlamaForCausalLM", DECODER),
    "llama, tied": _of("llama", "LlamaForCausalLM", DECODER, tie_word_embeddings=True),
    "llama, classifier": _of("llama", "LlamaForSequenceClassification", DECODER, num_labels=3),
    "llama, tagger": _of("llama", "LlamaForTokenClassification", DECODER),
    "llama, bare": _of("llama", "LlamaModel", DECODER),
    "qwen2": _of("qwen2", "Qwen2ForCausalLM", DECODER, tie_word_embeddings=False),
    "qwen3_moe": _of("qwen3_moe", "Qwen3MoeForCausalLM", DECODER, head_dim=8, tie_word_embeddings=False,
                     **_MOE),
    "mixtral": _of("mixtral", "MixtralForCausalLM", DECODER, num_local_experts=4, tie_word_embeddings=False),
    "gemma3_text": _of("gemma3_text", "Gemma3ForCausalLM", DECODER, head_dim=8),
    "gemma3": _of(
        "gemma3", "Gemma3ForConditionalGeneration", {},
        text_config={"model_type": "gemma3_text", **DECODER, "head_dim": 8},
        vision_config={"model_type": "siglip_vision_model", **VISION}, mm_tokens_per_image=4,
    ),
    "gpt2": _of("gpt2", "GPT2LMHeadModel", GPT2),
    "gpt_neo": _of("gpt_neo", "GPTNeoForCausalLM", {**DECODER, "num_layers": 2, "num_heads": 4},
                   attention_types=[[["global", "local"], 1]]),
    "gpt_neox": _of("gpt_neox", "GPTNeoXForCausalLM", DECODER, tie_word_embeddings=False),
    "bloom": _of("bloom", "BloomForCausalLM", {"hidden_size": 32, "n_layer": 2, "n_head": 4,
                                               "vocab_size": 96}),
    "opt": _of("opt", "OPTForCausalLM", {**DECODER, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "falcon": _of("falcon", "FalconForCausalLM", DECODER),
    "phi": _of("phi", "PhiForCausalLM", {**DECODER, "num_key_value_heads": 4}, tie_word_embeddings=False),
    "mamba": _of("mamba", "MambaForCausalLM", {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 96}),
    "bert": _of("bert", "BertForMaskedLM", DECODER),
    "bert, classifier": _of("bert", "BertForSequenceClassification", DECODER),
    "roberta": _of("roberta", "RobertaForMaskedLM", DECODER),
    "distilbert": _of("distilbert", "DistilBertForMaskedLM",
                      {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": 96}),
    "t5": _of("t5", "T5ForConditionalGeneration", T5),
    "t5 of 1.1": _of("t5", "T5ForConditionalGeneration", T5, tie_word_embeddings=False,
                     feed_forward_proj="gated-gelu"),
    "bart": _of("bart", "BartForConditionalGeneration", SEQ2SEQ, max_position_embeddings=24),
    "whisper": _of("whisper", "WhisperForConditionalGeneration", SEQ2SEQ, max_source_positions=16,
                   max_target_positions=16, num_mel_bins=8),
    "vit": _of("vit", "ViTForImageClassification", VISION),
    "llava": _of(
        "llava", "LlavaForConditionalGeneration", {},
        text_config={"model_type": "llama", **DECODER},
        vision_config={"model_type": "clip_vision_model", **VISION},
    ),
    "qwen2_5_vl": _of(
        "qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", {},
        text_config={"model_type": "qwen2_5_vl_text", **DECODER, "rope_scaling": {"type": "mrope",
                                                                                  "rope_type": "default",
                                                                                  "mrope_section": [1, 1,
                                                                                                    2]}},
        vision_config={"model_type": "qwen2_5_vl", "depth": 2, "hidden_size": 32, "intermediate_size": 48,
                       "num_heads": 4, "out_hidden_size": 32, "fullatt_block_indexes": [1]},
        tie_word_embeddings=False,
    ),
}  # fmt: skip
