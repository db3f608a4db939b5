"""One thin file a model family; the registry of all of them."""
