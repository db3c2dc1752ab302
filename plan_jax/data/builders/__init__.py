"""TFDS builders: one file a dataset, all in the schema of `plan_jax.data.dataset`."""
