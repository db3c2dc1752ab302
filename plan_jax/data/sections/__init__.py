"""Sections of a report: how they are read, the caption made of them, and the sides they name."""
