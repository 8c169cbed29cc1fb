"""Models, transforms, optimizers, schedulers and mixing of timm, for the plain `Trainer` or `TimmTrainer`."""

from .adaptive_gradient_clipping import AdaptiveGradientClippingCallback as AdaptiveGradientClippingCallback
from .models import TimmTransforms as TimmTransforms
from .models import create_timm_model as create_timm_model
from .models import create_timm_transforms as create_timm_transforms
from .optimizers import create_timm_optimizer as create_timm_optimizer
from .optimizers import timm_parameter_groups as timm_parameter_groups
from .timm_scheduler import TimmScheduler as TimmScheduler
from .timm_scheduler import timm_scheduler_fn as timm_scheduler_fn
from .timm_trainer import TimmTrainer as TimmTrainer
