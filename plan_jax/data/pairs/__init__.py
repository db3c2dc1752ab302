"""Reading of a user's own pairs: the rows of a manifest, and the annotations in its cells."""
