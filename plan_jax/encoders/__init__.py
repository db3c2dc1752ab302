"""Encoders: image towers, a text tower, and the two together."""
