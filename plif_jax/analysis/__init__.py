"""Looking inside trained networks: recordings, operation counts, pictures, other people's curves."""
