"""Processes: ranks and their collectives, what a worker owes its launcher, who keeps whom waiting."""
