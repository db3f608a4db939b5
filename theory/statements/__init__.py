"""The paper's statements and their neighbours as functions."""
