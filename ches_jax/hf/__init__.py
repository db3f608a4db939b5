"""A Hugging Face directory as data: config, weight index, lazy tensors, export. No jax arrays, no torch."""
