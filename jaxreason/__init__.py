"""jaxreason: pretraining, long chain-of-thought training and evaluation of small language models in JAX."""

__version__ = "0.1.0"
