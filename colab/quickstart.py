# ---
# jupyter:
#   accelerator: GPU
#   colab:
#     gpuType: T4
# ---

# %% [markdown]
# # Quick start
#
# Load the model that comes with the package, locate phrases in an image, then train a model of
# your own. The images are *phantoms*: synthetic radiographs, drawn with their reports and the true
# region of every finding. This is research software, **not for clinical use**.

# %% tags=["install"]
package = "plan_jax"  # @param {type:"string"}
# A wheel beside this notebook, or git+https:// and the address of the repository.
# %pip install -q {package}

# %% tags=["parameters"]
phrase = "effusion on the left"  # @param {type:"string"}
config = "demo"  # @param ["demo", "phantom", "gloria:phantom", "convirt:phantom"]
steps = 300  # @param {type:"integer"}
options = ""  # @param {type:"string"}

# %% [markdown]
# ## Locate a phrase
#
# Left and right are the patient's, as in a report. `phantom-plan` was trained on phantoms only: in
# a real film its maps mean nothing.

# %%
import plan_jax
from plan_jax.data.dataset import open_dataset

model = plan_jax.load("phantom-plan")
films = open_dataset("phantom", "test", data_dir="data", size=96, train=8, val=8, test=32)
film = next(film for film in films if any("effusion" in true.text for true in film.phrases))
print(film.text)
model.ground(film.image[..., 0], phrase)

# %% [markdown]
# The phrases of a report, each with its true region outlined in the first picture and the heat map
# in the second.

# %%
from IPython.display import Image, display

from plan_jax.page import figures

for true in film.phrases:
    found = model.ground(film.image[..., 0], true.text)
    print(true.text, "|", found)
    pictures = [figures.radiograph(film.image, true.mask), found.draw()]
    display(Image(figures.encode_picture(figures.concatenate(pictures))))

# %% [markdown]
# ## Train
#
# `demo` in full (1,800 steps) takes ten minutes on two CPU cores. A stopped run continues when its
# cell is run again. `options` are those of the command line, such as `--config.batch=64`.

# %%
from plan_jax import main

run = f"runs/{config.replace(':', '_')}_{steps}"
arguments = ["--config", config, f"--config.steps={steps}", *options.split()]
assert main.run([*arguments, "--workdir", run]) == 0

# %%
# %load_ext tensorboard
# %tensorboard --logdir runs

# %% [markdown]
# The page of the run: metrics beside null baselines that do not look at the image, pictures,
# curves.

# %%
from plan_jax.page.notebook import Report

Report(run)

# %% [markdown]
# ## Use what you trained

# %%
plan_jax.load(run).ground(film.image[..., 0], phrase)
