"""The theory of likelihood displacement as executable statements; see README.md for the table of all of them.

Shapes use the project's axis letters, with N responses (or pairs, where named so), T positions, V vocabulary, D width
and C contexts. Everything is pure jax and of the caller's precision; ``verify`` works in float64.
"""
