"""Other people's names for our tensors, both ways."""
