"""Recipes: frozen dataclasses that are read strictly from YAML and written back.

A recipe is the only configuration of a run. An unknown key is an error with a suggestion. Every value is checked when
the object is made. The resolved recipe is written into the run folder.
"""

from mm_moslora.config.data_config import DataConfig, HeldOut, SourceConfig
from mm_moslora.config.model_config import (
    AdapterConfig,
    BoxChoice,
    BoxFormName,
    Mode,
    ModelConfig,
    ProjectorConfig,
    Thinking,
    VisionConfig,
)
from mm_moslora.config.needed_packages import Need, needs, refuse_lacking
from mm_moslora.config.preference_config import GrpoConfig, KtoConfig, Objective, PreferenceConfig
from mm_moslora.config.recipe import Recipe, YamlRecipe, require_sft
from mm_moslora.config.recipe_reading import RECIPES_FOLDER, load_recipe, override_items, read_recipe, recipe_names
from mm_moslora.config.run_config import TRACKERS, OptimConfig, Precision, TrackConfig, TrainConfig, ValidateConfig

__all__ = [
    "RECIPES_FOLDER", "TRACKERS", "AdapterConfig", "BoxChoice", "BoxFormName", "DataConfig", "GrpoConfig", "HeldOut",
    "KtoConfig", "Mode", "ModelConfig", "Need", "Objective", "OptimConfig", "Precision", "PreferenceConfig",
    "ProjectorConfig", "Recipe", "SourceConfig", "Thinking", "TrackConfig", "TrainConfig", "ValidateConfig",
    "VisionConfig", "YamlRecipe", "load_recipe", "needs", "override_items", "read_recipe", "recipe_names",
    "refuse_lacking", "require_sft",
]  # fmt: skip
