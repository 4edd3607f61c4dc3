"""Trained dense models turned into routed ones."""
