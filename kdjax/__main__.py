"""``python -m kdjax`` is the ``kdjax`` command."""

from kdjax.cli import main

if __name__ == "__main__":
    main()
