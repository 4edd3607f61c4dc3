"""One run: its configuration, what is checked before it starts, its loop, engine and folder."""
