"""Where test processes come from: a server that has imported everything once forks them, which saves each the seconds of its imports."""

from __future__ import annotations

import multiprocessing as mp

SERVER = mp.get_context("forkserver")
# All that a training imports in its course; DeepSpeed's optimizers bring torch's compiler, the slowest of them.
SERVER.set_forkserver_preload(
    [
        "dnc_dist.commands.train",
        "dnc_dist.engine.trainer",
        "dnc_dist.report",
        "matplotlib.backends.backend_agg",
        "deepspeed.runtime.zero.muon.original_muon",
        "scipy.optimize",
        "scipy.sparse",
        "requests",
        "tests.run_fixtures",
    ]
)
