"""`python -m vlmlayers`, which `torchrun -m vlmlayers` starts in several processes."""

from vlmlayers.cli import main

if __name__ == "__main__":
    main()
