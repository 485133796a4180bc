"""The command line: `mqadapt`."""

from mqadapt_rs.cli.entry_point import main

__all__ = ["main"]
