"""Start the workers of a launch, here or on several machines, watch them, and explain once how they ended.

workers.py runs a launch; agent.py starts the workers of a machine and watches them; host.py and meeting.py are how several machines
find each other and hear of each other's failures (peers.py: what they are to each other), channel.py and secret.py how they know that it
is they who speak; network.py knows addresses and interfaces; verdict.py names the cause. docs/security.md says why the meeting is not
that of torch.
"""

from dnc_dist.processes.launch.verdict import verdict
from dnc_dist.processes.launch.workers import launch_workers, workers_here

__all__ = ["launch_workers", "verdict", "workers_here"]
