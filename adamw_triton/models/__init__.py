"""Which weights a model on disk has, without loading any and without running anybody's code.

``read_model`` takes a folder, a safetensors file or a config.json. Needs nothing but Python.
"""

from adamw_triton.models.config import Dimensions
from adamw_triton.models.model import Model, read_model
from adamw_triton.models.sketch import sketch
from adamw_triton.models.weights import ModelFileError, Weight

__all__ = ["Dimensions", "Model", "ModelFileError", "Weight", "read_model", "sketch"]
