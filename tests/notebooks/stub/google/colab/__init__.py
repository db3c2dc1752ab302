"""Stands in for the module of Colab's runtime: a drive that is a folder, and no browser.

`PLAN_JAX_STUB_DRIVE` is the folder that outlives the machine. Calls are appended to `calls.txt` in
there.
"""
