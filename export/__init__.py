"""From a Hugging Face checkpoint to a bundle for one device (host side)."""
