"""Layers shared by encoders and heads."""
