"""`python -m sparkir`, and so `torchrun -m sparkir`."""

from sparkir.cli import main

main()
