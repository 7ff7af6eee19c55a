"""What is traced: thin modules whose parameters have the checkpoint's canonical names."""
