"""What a machine can do, and what a step on it costs."""
