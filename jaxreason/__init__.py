"""jaxreason: small language models that reason, trained in JAX."""

__version__ = "0.1.0"
