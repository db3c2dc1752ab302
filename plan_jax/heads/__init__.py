"""Heads: the small flax modules that downstream tasks fit on a vision tower, one file each."""
