"""``python -m bytelm``, and the ``bytelm`` command."""

import signal


def main() -> None:
    """Run the command line."""
    # Nothing has begun while it loads: Ctrl-C ends the process without a traceback.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from bytelm.cli import main as run

    run()


if __name__ == "__main__":
    main()
