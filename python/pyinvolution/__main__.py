"""``python -m pyinvolution``: the command line."""

from pyinvolution.cli import main

main()
