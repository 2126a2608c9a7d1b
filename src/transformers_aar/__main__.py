"""`python -m transformers_aar`, the same as the command `transformers-aar`."""

from .cli import main

if __name__ == "__main__":
    main()
