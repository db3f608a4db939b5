"""The recipe of what ships in ``ches_jax/embedded``: world, tokenizer, pairs, model."""
