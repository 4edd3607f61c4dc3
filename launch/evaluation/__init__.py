"""How well a model predicts text that it is given: windows, losses, operations."""
