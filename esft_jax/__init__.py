"""Expert-Specialized Fine-Tuning (ESFT, arXiv 2407.01906) of Mixture-of-Experts models in JAX.

The public names are those of `__init__.pyi`; every command is a thin wrapper of them. They are
imported on first use, so that `esft --help` needs no JAX.
"""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
