"""Batches on a Ray cluster, whose nodes are processes of this machine, in an environment of their own."""
