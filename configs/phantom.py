"""PLAN on phantoms, a longer run: three times the images and steps of the demo.

plan-jax --config phantom
plan-jax --config phantom:hard
"""

from ml_collections import ConfigDict

from configs import plan


def get_config(difficulty: str = "standard") -> ConfigDict:
    """Returns the demo's model on 12,288 phantoms, standard or hard.

    Raises:
      ValueError: another difficulty.
    """
    if difficulty not in ("standard", "hard"):
        raise ValueError(f"difficulty {difficulty!r} is unknown; use standard or hard")
    config = plan.get_config("phantom")
    config.steps = 5000
    config.data.builder = ConfigDict({"train": 12288})
    if difficulty == "hard":
        config.data.builder.difficulty = "hard"
        # The longest report has 110 words; a shorter limit would leave out whole sentences.
        config.data.max_tokens = 144
        config.data.max_words = 112
    config.checkpoint.every = 1000
    config.parallel.cpu_devices = 2
    return config
