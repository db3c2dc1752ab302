"""Data: procedural phantoms, a user's own pairs, and the pipeline from disk to device."""
