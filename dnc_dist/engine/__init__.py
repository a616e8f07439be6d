"""The training: everything that reads the configuration and turns it into steps."""
