"""Text from a model: batched sampling with a cache of keys and values, resumable, the same whatever the batch."""
