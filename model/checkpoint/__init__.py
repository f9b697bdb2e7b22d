"""Checkpoints: `policy` decides (pure), `lease` keeps one writer, `storage` makes files durable, `store` saves and loads.

docs/checkpoints.md describes the format on disk and the guarantees.
"""
