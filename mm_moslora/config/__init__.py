"""Recipes: frozen dataclasses, and their strict way from YAML and back.

A recipe is the only configuration of a run. Unknown keys are errors with a suggestion, every value is checked when the
object is made, and the resolved recipe is written into the run folder.
"""

from mm_moslora.config.data import DataConfig, SourceConfig
from mm_moslora.config.model import AdapterConfig, Mode, ModelConfig, ProjectorConfig, Thinking, VisionConfig
from mm_moslora.config.recipe import RECIPES_FOLDER, Recipe, load_recipe, override_items, recipe_names
from mm_moslora.config.run import OptimConfig, Precision, TrackConfig, TrainConfig, ValidateConfig

__all__ = [
    "RECIPES_FOLDER",
    "AdapterConfig",
    "DataConfig",
    "Mode",
    "ModelConfig",
    "OptimConfig",
    "Precision",
    "ProjectorConfig",
    "Recipe",
    "SourceConfig",
    "Thinking",
    "TrackConfig",
    "TrainConfig",
    "ValidateConfig",
    "VisionConfig",
    "load_recipe",
    "override_items",
    "recipe_names",
]
