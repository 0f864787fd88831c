"""`python -m mm_moslora` is `mm-moslora`."""

from mm_moslora.cli import main

if __name__ == "__main__":
    main()
