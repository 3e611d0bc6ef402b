"""The network: the K-convolution mixture and what is built from it."""
