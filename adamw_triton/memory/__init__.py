"""How much memory a host and a GPU have, and pinned host memory of exact size."""
