"""rlvr: reinforcement learning with verifiable rewards on language models, and a measure of what it does to them."""

__version__ = "0.1.0"
