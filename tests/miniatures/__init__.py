"""Miniatures of public datasets, true to their formats."""
