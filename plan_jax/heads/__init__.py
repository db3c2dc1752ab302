"""Heads: the small flax modules that downstream tasks fit to an image tower, one file each."""
