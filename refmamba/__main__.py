"""`python -m refmamba` is the `refmamba` command."""

from refmamba.commands.entry import main

if __name__ == "__main__":
    main()
