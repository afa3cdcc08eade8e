"""``python -m dirotq``: the same as the console script ``dirotq``."""

from dirotq.cli import main

if __name__ == "__main__":
    main()
