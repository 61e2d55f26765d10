"""Studies of how a model learned what it knows: from a checkpoint and the data that it has read."""
