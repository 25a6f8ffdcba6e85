"""`python -m esft_jax VERB ...` is `esft VERB ...`; without a verb, it lists them."""

import sys

from esft_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
