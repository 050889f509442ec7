"""Loading a causal language model and finding its parts."""
