"""Preference training that watches displacement: state, objective, step, loop, checkpoints, displacement log."""
