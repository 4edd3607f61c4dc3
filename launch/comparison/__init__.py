"""Runs held against one another: what is compared, and what was found."""
