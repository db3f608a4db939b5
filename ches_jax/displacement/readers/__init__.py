"""Readers of what people have, one file a format: logs of trainers, runs of ours, tables of log-probabilities."""
