"""What is started as every rank: `python -m slurm.rank MODULE:FUNCTION RUN_DIR`. No pickle: all that a rank needs is on disk.

Under a lead it is the rank's keeper, which forks the rank (slurm/keeper.py); started by hand it is the rank itself.
"""

import importlib
import os
import sys

from slurm import keeper, signals


def main() -> None:
    entry, run_dir = sys.argv[1:]
    if keeper.LEAD in os.environ:
        kept = keeper.keep(entry)
        if isinstance(kept, int):
            sys.exit(kept)
        kept(run_dir)
        return
    signals.note_early()  # a warning may come while torch is still being imported
    module, _, function = entry.partition(":")
    getattr(importlib.import_module(module), function)(run_dir)


if __name__ == "__main__":
    main()
