"""Slow, obvious implementations in plain torch, written from the papers, that share no code with the library."""
