"""What a language model is: its configuration, the released presets, and the Flax NNX modules."""
