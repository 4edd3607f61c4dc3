"""Trying to lose something: `make soak`, or `python -m tests.soak PART`."""
