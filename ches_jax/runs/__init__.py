"""Run directories: identity, configuration, files that are whole or not there."""
