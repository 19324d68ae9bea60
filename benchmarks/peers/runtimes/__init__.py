"""One script per runtime, `ours` among them; each has its own Python environment. `benchmarks.peers.run` starts them."""
