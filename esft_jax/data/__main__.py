"""`python -m esft_jax.data`: see `esft_jax.show_data`."""

import sys

from esft_jax.data import main

if __name__ == "__main__":
    sys.exit(main())
