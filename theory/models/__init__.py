"""Real and toy models behind one protocol, and their kernels."""
