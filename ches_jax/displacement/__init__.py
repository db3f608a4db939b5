"""Did the log-probabilities of pairs move, which way, and what is the verdict on a run?"""
