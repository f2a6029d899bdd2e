"""Where scripts that are older than `places/` look for the store."""

from adamw_triton.places.placing import Wanted
from adamw_triton.places.store import Store

__all__ = ["Store", "Wanted"]
