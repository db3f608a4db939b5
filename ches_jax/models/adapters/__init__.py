"""LoRA adapters: the mathematics, and PEFT's files."""
