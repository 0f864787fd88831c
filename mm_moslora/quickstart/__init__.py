"""The quickstart: training, evaluation and export with real models and data from package registries."""
