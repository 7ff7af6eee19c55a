"""`gemma-edge verify`: measures a bundle against its checkpoint; nothing here runs on the device."""
