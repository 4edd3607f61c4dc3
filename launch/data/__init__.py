"""What runs learn from: text and images, as rows that are a pure function of (seed, row)."""
