"""`python -m attrreg`: the same as the command `attrreg`."""

from attrreg.cli import main

main()
