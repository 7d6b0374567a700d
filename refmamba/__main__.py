"""`python -m refmamba` is the `refmamba` command."""

from refmamba.commands.main import main

if __name__ == "__main__":
    main()
