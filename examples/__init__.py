"""Complete applications built on gemma-edge."""
