"""What srun starts as every rank: `python -m slurm.rank MODULE:FUNCTION RUN_DIR`. No pickle: all that a rank needs is on disk."""

import importlib
import sys

from slurm.signals import note_early


def main() -> None:
    note_early()  # a warning may come while torch is still being imported
    entry, run_dir = sys.argv[1:]
    module, _, function = entry.partition(":")
    getattr(importlib.import_module(module), function)(run_dir)


if __name__ == "__main__":
    main()
