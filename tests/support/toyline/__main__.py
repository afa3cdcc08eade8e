"""``python -m toyline``: the command line on the toy tree, for tests that need a process."""

from dirotq.cli import main

if __name__ == "__main__":
    main(config="toyline.conf")
