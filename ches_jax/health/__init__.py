"""Is a preference data set fit to learn from? Checks of its texts alone: no model, no tokenizer."""
