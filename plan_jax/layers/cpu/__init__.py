"""Faster gradients on a CPU, one operation per file."""
