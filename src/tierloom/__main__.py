"""`python -m tierloom`."""

from tierloom.adapters.cli import main

if __name__ == "__main__":
    main()
