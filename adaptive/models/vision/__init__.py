"""A plain vision transformer: images to classes, host of the merging and pruning methods."""
