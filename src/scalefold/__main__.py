"""``python -m scalefold`` is the ``scalefold`` command."""

from scalefold.cli import main

if __name__ == "__main__":
    main()
