"""Plans of pod runs, compiled without a TPU."""
