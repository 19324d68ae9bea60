"""Code that several benchmarks use: rounds of contenders, the machine, its checkpoint with random weights, profiles and logs."""
