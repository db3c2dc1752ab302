"""All seven tasks on the procedural phantoms, from one checkpoint: one table, one page.

plan-jax --config eval/all_phantom --checkpoint runs/demo

Heads are small and fits are short, so that everything takes ten minutes on two cores. Each head is
also fitted to the same tower with random weights.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the evaluation; the data are those of the checkpoint."""
    config = ConfigDict()
    config.eval = ConfigDict(
        {
            "tasks": (
                "grounding",
                "retrieval",
                "zero_shot",
                "classification",
                "segmentation",
                "detection",
                "report_generation",
            ),
            "split": "test",
            "limit": 300,
            "num_prior_records": 1000,
            "random_baseline": True,
        }
    )
    config.eval.zero_shot = {"validate": True}
    config.eval.classification = {"standardise": True, "learning_rate": 1e-2}
    config.eval.segmentation = {
        "targets": ("lungs", "heart", "findings"),
        "unet_widths": (64, 32, 16, 8),
        "max_train_records": 384,
        "epochs": 6,
        "learning_rate": 2e-3,
    }
    config.eval.detection = {
        "widths": (32, 16, 8),
        "max_train_records": 256,
        "epochs": 20,
        "learning_rate": 3e-3,
    }
    config.eval.report_generation = {
        "width": 128,
        "feed_forward": 256,
        "heads": 4,
        "encoder_layers": 0,
        "layers": 2,
        "summary": True,
        "visual_dropout": 0.1,
        "learning_rate": 2e-3,
        "clip_value": 1.0,
        "epochs": 5,
        "no_repeat_ngram": 0,
    }
    return config
