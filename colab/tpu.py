# ---
# jupyter:
#   accelerator: TPU
#   colab:
#     gpuType: V5E1
# ---

# %% [markdown]
# # Train on a TPU
#
# Colab's TPU (v5e-1) has one device, Kaggle's (v5e-8) has eight. The same cells run on both, and on
# a GPU or CPU. One process holds a TPU, so everything happens in this kernel: do not start
# `!python` beside it. This is research software, **not for clinical use**.

# %% tags=["install"]
package = "plan_jax"  # @param {type:"string"}
# A wheel beside this notebook, or git+https:// and the address of the repository.
# %pip install -q {package}

# %% tags=["parameters"]
config = "compare:plan"  # @param {type:"string"}
steps = 800  # @param {type:"integer"}
batch = 64  # @param {type:"integer"}
microbatch = 0  # @param {type:"integer"}
dtype = "bfloat16"  # @param ["bfloat16", "float32"]
platform = "tpu"  # @param ["tpu", "gpu", "cpu"]
copies = "plan_jax/tpu"  # @param {type:"string"}
options = ""  # @param {type:"string"}

# %% [markdown]
# ## Which device
#
# JAX falls back to the CPU with no more than a warning. Set `platform` to what you expect.

# %%
import jax

devices = jax.devices()
print(len(devices), devices[0].platform, devices[0].device_kind, "JAX", jax.__version__)
assert devices[0].platform == platform, f"{devices} are not of {platform}: change the runtime"

# %% [markdown]
# ## Where the steps are kept
#
# The run is on the disk of this machine, which ends with the session. Complete steps are copied to
# `copies`: in Google Drive on Colab, in a folder `copies` beside this notebook elsewhere. After a
# disconnection, run all cells again: the run is restored from its copies and continues, with the
# same result.

# %%
import sys
from pathlib import Path

in_colab = "google.colab" in sys.modules
if in_colab:
    from google.colab import drive

    drive.mount("/content/drive")
storage = Path("/content/drive/MyDrive" if in_colab else "copies")

# %%
from plan_jax.checkpoint import copy_repeatedly, restore_steps

run = "runs/tpu"
print("newest step:", restore_steps(storage / copies, run))

# %% [markdown]
# ## Train on all devices
#
# The batch is divided among the devices, and every device sees the negatives of all. `bfloat16`
# halves the memory of the encoders; losses, norms and softmax stay in float32. A T4 has no units
# for bfloat16: use float32 there.
#
# A batch that does not fit still trains with its whole loss if each device encodes `microbatch`
# pairs at a time; 0 encodes its whole part at once. The number must divide the batch of a device.
# Before you take a TPU, `--mode compile` tells on any computer whether a batch fits its memory:
#
#     plan-jax --config compare:plan --mode compile --topology v5e-1 --batch 512 \
#       --config.dtype=bfloat16

# %%
from plan_jax import main

arguments = ["--config", config, f"--config.batch={batch}", f"--config.steps={steps}"]
arguments += [f"--config.microbatch={microbatch}", f"--config.dtype={dtype}", *options.split()]
with copy_repeatedly(run, storage / copies):
    assert main.run([*arguments, "--workdir", run]) == 0

# %% [markdown]
# ## One device or all
#
# The same batch on a single device, for at most 100 steps; compare images per second.

# %%
from plan_jax.evaluate import compare_runs

single = ["--config.parallel.devices=1", "--config.eval.tasks=('retrieval',)"]
single += [f"--config.steps={min(steps, 100)}"]
assert main.run([*arguments, *single, "--workdir", "runs/one_device"]) == 0
compare_runs({f"{len(devices)} devices": run, "1 device": "runs/one_device"})

# %%
from plan_jax.page.notebook import Report

Report(run)

# %% [markdown]
# ## Before you leave
#
# Drive writes in the background, and loses what it has not written when the session ends.

# %%
if in_colab:
    drive.flush_and_unmount()
