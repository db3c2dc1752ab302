"""Layers that encoders, methods and heads share."""
