# ---
# jupyter:
#   accelerator: GPU
#   colab:
#     gpuType: T4
# ---

# %% [markdown]
# # Compare two methods on the same data
#
# Both runs see the same phantoms in the same order, have the same encoders and take the same number
# of steps. Phantoms are synthetic radiographs with reports and the true region of every finding.
# This is research software, **not for clinical use**.

# %% tags=["install"]
package = "plan_jax"  # @param {type:"string"}
# A wheel beside this notebook, or git+https:// and the address of the repository.
# %pip install -q {package}

# %% tags=["parameters"]
first = "convirt"  # @param ["convirt", "gloria", "mgca", "asg", "place", "plan"]
second = "plan"  # @param ["convirt", "gloria", "mgca", "asg", "place", "plan"]
steps = 800  # @param {type:"integer"}
seed = 0  # @param {type:"integer"}
options = ""  # @param {type:"string"}

# %% [markdown]
# ## Train
#
# A stopped run continues when its cell is run again. `options` are those of the command line, such
# as `--config.batch=64`.

# %%
from plan_jax import main

runs = {name: f"runs/compare/{name}_{seed}" for name in (first, second)}
arguments = [f"--config.steps={steps}", f"--config.seed={seed}", *options.split()]
for name, run in runs.items():
    assert main.run(["--config", f"compare:{name}", "--workdir", run, *arguments]) == 0

# %% [markdown]
# ## Compare
#
# Below the two methods stand null baselines, which do not look at the image. One seed is an
# anecdote: repeat with other values of `seed` before you conclude anything.

# %%
from plan_jax.evaluate import compare_runs

compare_runs(runs)

# %%
from IPython.display import Image, display

for run in runs.values():
    display(Image(f"{run}/figures/curves.png"))

# %% [markdown]
# ## Pages
#
# The regions that each method finds, and all metrics.

# %%
from plan_jax.page.notebook import Report

Report(runs[first])

# %%
Report(runs[second])
