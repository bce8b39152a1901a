"""What may be asked for, what may be shown, and how others can tell where an image is from."""
