"""What trained models are asked for: text, images, and how good these are."""
