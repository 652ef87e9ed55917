"""Other people's kernels, each as benchmarks/layers.py asks it of a provider: called where they are installed, never copied."""
