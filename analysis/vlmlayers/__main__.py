"""The command `vlmlayers`, also as `python -m vlmlayers`, which `torchrun` starts."""

import sys

from vlmlayers.errors import RESUME


def main() -> None:
    """Run the command line; Ctrl-C while it is still being imported ends in one line as well."""
    try:
        from vlmlayers.cli import main as run
    except KeyboardInterrupt:
        sys.stderr.write(f"\n{RESUME}\n")
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
