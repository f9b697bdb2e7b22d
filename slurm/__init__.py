"""Where a run runs: all that knows Slurm, and nothing that knows llamas."""
