"""Which columns of a data set hold the prompt, the responses, and what says which response is preferred."""
