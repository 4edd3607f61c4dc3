"""What a checkpoint is, and how one is read and written."""
