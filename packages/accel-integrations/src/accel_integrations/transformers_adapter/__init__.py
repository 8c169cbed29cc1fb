"""Train models of transformers: batches are mappings, losses are the model's, and tokens are counted."""

from .parameter_groups import transformers_parameter_groups as transformers_parameter_groups
from .transformers_scheduler import transformers_scheduler_fn as transformers_scheduler_fn
from .transformers_trainer import TransformersTrainer as TransformersTrainer
