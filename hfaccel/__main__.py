"""``python -m hfaccel``."""

from hfaccel.cli.app import main

if __name__ == "__main__":
    main()
