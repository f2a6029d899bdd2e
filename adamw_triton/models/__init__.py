"""Which weights a model on disk has, without loading any and without running anybody's code.

``read_model`` takes a folder, a safetensors file or a config.json. Needs nothing but Python; who can build an
architecture (``adamw_triton.architectures``) is given to it as a function.
"""

from adamw_triton.models.config import Dimensions
from adamw_triton.models.model import Model, read_model
from adamw_triton.models.sketch import sketches
from adamw_triton.models.weights import ModelFileError, Weight

__all__ = ["Dimensions", "Model", "ModelFileError", "Weight", "read_model", "sketches"]
