"""What makes a step of training: the optimizer of a Config and its learning rate."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from .config import Config


def new_optimizer(config: Config, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """SGD with momentum, or AdamW, whose beta_1 is `momentum` and whose beta_2 is 0.999. foreach: the same in fewer
    calls, by itself on a GPU only."""
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, config.lr, (config.momentum, 0.999), weight_decay=config.weight_decay,
                                 foreach=True)
    return torch.optim.SGD(parameters, config.lr, config.momentum, weight_decay=config.weight_decay, foreach=True)


def learning_rate(config: Config, progress: float, step: float) -> float:
    """The learning rate after `progress` epochs, of which one step is the part `step`: a linear warm-up, complete with
    the last step of warmup_epochs, times a cosine from lr down to 0."""
    warmup = min((progress + step) / config.warmup_epochs, 1.0) if config.warmup_epochs else 1.0
    return warmup * config.lr * (1 + math.cos(math.pi * progress / config.epochs)) / 2
