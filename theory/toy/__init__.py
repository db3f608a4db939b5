"""The unconstrained-features model and its dynamics."""
