# ---
# jupyter:
#   accelerator: GPU
#   colab:
#     gpuType: T4
# ---

# %% [markdown]
# # Evaluate a model on a benchmark
#
# `checkpoint` is the folder of a run, a model folder, a model on the Hugging Face hub
# (`owner/name`) or the model of the package (`phantom-plan`). `benchmark` is a config of `eval/`.
# This is research software, **not for clinical use**.

# %% tags=["install"]
package = "plan_jax"  # @param {type:"string"}
# A wheel beside this notebook, or git+https:// and the address of the repository.
# %pip install -q {package}

# %% tags=["parameters"]
checkpoint = "phantom-plan"  # @param {type:"string"}
published = ""  # @param {type:"string"}
published_options = ""  # @param {type:"string"}
benchmark = "eval/all_phantom"  # @param {type:"string"}
options = "--config.eval.tasks=('grounding','retrieval','zero_shot')"  # @param {type:"string"}

# %% [markdown]
# ## Published models
#
# Name a config, as `published/biovil`, to evaluate its model in place of `checkpoint`. `biovil`,
# `biovil_t`, `rad_dino`, `xray_dinov2` and `radjepa` are fetched from the hub. The others are read
# from a file, named as `--config.weights.vision=FILE` in `published_options`; docs/published.md
# says which. Their licences are their authors'.

# %%
from plan_jax import main
from plan_jax.command.config_files import list_names

print(*(name for name in list_names() if name.startswith(("eval/", "published/"))), sep="\n")
if published:
    checkpoint = f"runs/{published}"
    arguments = ["--config", published, *published_options.split()]
    assert main.run([*arguments, "--workdir", checkpoint]) == 0

# %% [markdown]
# ## Evaluate
#
# Benchmarks of real images need their data: `options` are those of the command line, such as
# `--config.data.builder.manifest=data/kermany/manifest.csv`.

# %%
arguments = ["--config", benchmark, "--checkpoint", checkpoint, *options.split()]
assert main.run([*arguments, "--workdir", "runs/evaluate"]) == 0

# %% [markdown]
# ## Results
#
# Every metric beside null baselines that do not look at the image. A model that does not beat them
# has learned where findings usually are, not where this one is.

# %%
from pathlib import Path

from IPython.display import Image, Markdown, display

results = Path("runs/evaluate/eval", Path(main.default_workdir(benchmark)).name)
display(Markdown((results / "table.md").read_text("utf-8")))

# %%
for picture in sorted(results.glob("figures/*.png"))[:6]:
    print(picture.stem)
    display(Image(str(picture)))

# %%
from plan_jax.page.notebook import Report

Report(results)
