"""`python -m tierloom.adapters.cli`."""

from tierloom.adapters.cli import main

main()
