# ---
# jupyter:
#   accelerator: GPU
#   colab:
#     gpuType: T4
# ---

# %% [markdown]
# # Train on your own images and reports
#
# You need a folder with images and a manifest (CSV, JSON Lines or Parquet) with one row per pair of
# image and report: the columns `image`, the path of a file, and `text`. Put no patient data on
# machines that must not hold them. This is research software, **not for clinical use**.

# %% tags=["install"]
package = "plan_jax"  # @param {type:"string"}
# A wheel beside this notebook, or git+https:// and the address of the repository.
# %pip install -q {package}

# %% tags=["parameters"]
source = "my_study"  # @param {type:"string"}
manifest = "manifest.csv"  # @param {type:"string"}
config = "pairs"  # @param ["pairs", "plan_pairs_minilm"]
steps = 600  # @param {type:"integer"}
copies = "plan_jax/my_study"  # @param {type:"string"}
phrase = "effusion on the left"  # @param {type:"string"}
options = ""  # @param {type:"string"}

# %% [markdown]
# ## Fetch the data
#
# On Colab, `source` and `copies` are folders in Google Drive; elsewhere, folders beside this
# notebook. On Kaggle, `source` may be `/kaggle/input/NAME`. Drive is slow with many small files, so
# the data are copied to the disk of this machine once.

# %%
import shutil
import sys
from pathlib import Path

in_colab = "google.colab" in sys.modules
if in_colab:
    from google.colab import drive

    drive.mount("/content/drive")
storage = Path("/content/drive/MyDrive" if in_colab else ".")
data = Path("data", source.strip("./").replace("/", "_"))
if not data.exists():
    part = shutil.copytree(storage / source, data.with_suffix(".part"), dirs_exist_ok=True)
    part.rename(data)
print(data, "has", sum(path.is_file() for path in data.rglob("*")), "files")

# %% [markdown]
# ## Restore
#
# The run is on the disk of this machine, which ends with the session. Complete steps are copied to
# `copies` as archives. After a disconnection, run all cells again: the run is restored and
# continues, with the same result.

# %%
from plan_jax.checkpoint import copy_repeatedly, restore_steps

run = Path("runs", data.name)
print("newest step:", restore_steps(storage / copies, run))

# %% [markdown]
# ## Train
#
# A summary says what was understood of the manifest: columns, splits, labels and what was left out.
# Wrong values end the run with one sentence. `options` are those of the command line, such as
# `--config.data.builder.columns={'text':'report'}`.

# %%
from plan_jax import main

arguments = [f"--config.data.builder.manifest={data / manifest}", f"--config.steps={steps}"]
with copy_repeatedly(run, storage / copies):
    assert main.run(["--config", config, "--workdir", str(run), *arguments, *options.split()]) == 0

# %%
from plan_jax.page.notebook import Report

Report(run)

# %% [markdown]
# ## Use the model

# %%
import plan_jax

model = plan_jax.load(run)
kinds = (".png", ".jpg", ".jpeg", ".dcm")
film = next(path for path in sorted(data.rglob("*")) if path.suffix.lower() in kinds)
model.ground(film, phrase)

# %% [markdown]
# ## Before you leave
#
# Drive writes in the background, and loses what it has not written when the session ends.

# %%
if in_colab:
    drive.flush_and_unmount()
