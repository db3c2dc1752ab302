"""TFDS builders, one file per dataset, all in the schema of `plan_jax.data.schema`."""
