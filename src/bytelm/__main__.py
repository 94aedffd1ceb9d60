"""``python -m bytelm``."""

from bytelm.cli import main

if __name__ == "__main__":
    main()
