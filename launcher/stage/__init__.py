"""Bringing tokenizer, training data and weights to a cluster's shared file system, verified."""
