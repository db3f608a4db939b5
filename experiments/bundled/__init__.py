"""The recipe of what ships in ``ches_jax/bundled``: world, tokenizer, pairs, model."""
