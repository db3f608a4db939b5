"""From rows to batches of a training run."""
