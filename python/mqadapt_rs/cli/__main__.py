"""`python -m mqadapt_rs.cli`."""

from mqadapt_rs.cli import main

main()
