"""What a lease of a GPU must give in minutes: four commands that write after every figure. See `python -m benchmarks.gpu --help`."""
