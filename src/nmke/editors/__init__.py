"""Methods that turn requests into weight updates."""
