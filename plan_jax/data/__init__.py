"""Data: procedural phantoms, a user's own pairs, and the way from disk to device."""
