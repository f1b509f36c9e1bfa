"""The command line: `tierloom`, or `python -m tierloom.adapters.cli`."""

from __future__ import annotations


def main() -> None:
    """Run the command that the process was started with."""
    from tierloom.adapters.cli.commands import main as run

    run()
