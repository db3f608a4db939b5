"""What the experiments share: items, training runs, intervals, figures."""
