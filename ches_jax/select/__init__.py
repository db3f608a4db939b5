"""From scores to a preference data set, with controls."""
