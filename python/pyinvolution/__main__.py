"""``python -m pyinvolution``: the command line."""

from pyinvolution.cli import main

if __name__ == "__main__":  # spawned processes import this module
    main()
