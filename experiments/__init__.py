"""Which runs, and what came out of them: the library says how."""
