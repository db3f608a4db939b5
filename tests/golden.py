"""The directories of ``../shared/golden``: a model each, with what float64 arithmetic says of 24 pairs."""

EARLIER = (
    "llama", "llama_tied", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "olmo", "olmo2", "gpt2", "gpt_neox", "phi3",
    "starcoder2",
)  # fmt: skip
WITH_A_STATE = ("lfm2", "qwen3_5")
MULTIMODAL = ("gemma3_multimodal", "qwen3_5_multimodal")
NEWER = (
    "olmo3", "smollm3", "glm4", "granite", "cohere2", "ministral3", "mixtral", "qwen3_moe", "olmoe", "gpt_oss",
    "deepseek_v3", "llama4", "gemma4",
)  # fmt: skip
TEXT = (*EARLIER, *NEWER, *WITH_A_STATE)
"""Those that are text models from the beginning."""
GOLDEN = (*TEXT, *MULTIMODAL)
"""All of them."""
