"""dstrain: pretraining of Transformer encoders that comes back exactly after anything that interrupts it."""

__version__ = "0.1.0"
