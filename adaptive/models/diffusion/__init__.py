"""A diffusion transformer, what it is trained on and how it samples."""
