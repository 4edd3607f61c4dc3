"""Speculative decoding in three parts: drafts, controllers, and verification."""
