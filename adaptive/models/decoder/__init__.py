"""A causal language model of this library's blocks, its cache and its ways to sample."""
