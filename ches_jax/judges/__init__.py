"""Did a response refuse? Judged by a list of phrases, by a language model, or by labels from a file."""
