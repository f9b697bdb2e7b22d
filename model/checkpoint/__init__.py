"""Checkpoints: `policy` decides (pure), `store` writes, verifies and loads."""
