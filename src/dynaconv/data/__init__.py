"""Images on their way to the network: where they come from, how they are split, augmented and batched."""
