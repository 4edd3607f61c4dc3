"""Attention over sequences that lie round a ring of ranks."""
