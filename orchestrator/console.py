"""Where commands print what is not a table."""

from rich.console import Console


def plain_console(quiet: bool = False) -> Console:
    """Words as they are: no markup (a rank's last words have brackets), no colours, long lines left to the terminal."""
    return Console(highlight=False, soft_wrap=True, markup=False, quiet=quiet)
