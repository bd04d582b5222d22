"""Dense against sparse attention on decoders trained from scratch: twins that differ in nothing else."""
