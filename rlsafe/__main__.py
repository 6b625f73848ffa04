"""`python -m rlsafe` is the `rlsafe` command."""

from rlsafe.cli import main

if __name__ == "__main__":
    main()
