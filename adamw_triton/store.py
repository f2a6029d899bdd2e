"""Where scripts that are older than `places/` look for the store."""

from adamw_triton.places.store import Store, Wanted

__all__ = ["Store", "Wanted"]
