"""One decoder in Flax NNX; a Hugging Face directory becomes a model here."""
