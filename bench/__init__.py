"""Measurements of adamw_triton beside its peers: ``python -m bench SUITE``. Not installed."""
