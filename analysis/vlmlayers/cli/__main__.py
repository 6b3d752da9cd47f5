"""`python -m vlmlayers.cli`, the same as `python -m vlmlayers`."""

from vlmlayers.cli import main

if __name__ == "__main__":
    main()
