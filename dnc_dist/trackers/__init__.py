"""Trackers that show a run elsewhere: in W&B, in TensorBoard. What they show is a function of what the run keeps in its directory."""
