"""Which weights a model on disk has, without loading any and without running anybody's code.

``read_model`` takes a folder, a safetensors file or a config.json. Needs nothing but Python.
"""

from adamw_triton.model_files.config import Dimensions
from adamw_triton.model_files.model import Model, read_model
from adamw_triton.model_files.sketch import sketch
from adamw_triton.model_files.weights import ModelFileError, Weight

__all__ = ["Dimensions", "Model", "ModelFileError", "Weight", "read_model", "sketch"]
