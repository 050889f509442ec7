"""Facts and openers written for this project."""
