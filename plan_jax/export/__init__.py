"""Saving a trained model as a folder of plain files, and sharing it on the Hugging Face Hub.

`folder` writes and reads the files of a model folder, `card` describes it, `hub` uploads and
fetches it, `sources` finds the folder that a name means, and `pretrained` joins them.
`python -m plan_jax.export` is the command.
"""
