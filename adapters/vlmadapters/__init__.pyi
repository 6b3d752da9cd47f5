from .clip.logits import class_logits as class_logits
from .data.fewshot import few_shot as few_shot
from .methods import METHODS as METHODS
from .methods.base import Method as Method
from .methods.mma.config import MMAConfig as MMAConfig
from .methods.mma.module import attach as attach
from .protocols.results import summarise as summarise
from .protocols.train import base_to_novel as base_to_novel
from .protocols.train import train as train
from .training.recipes import load_recipe as load_recipe
from .validation.search import search as search
from .validation.validate import validate as validate

__version__: str
