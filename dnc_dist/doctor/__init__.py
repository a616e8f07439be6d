"""Checks of the project's promises on the user's own machine: environment, data, network, and parity of W ranks with one."""
