"""Weights that timm downloads: taken from this machine's cache, fetched by one process of a machine, or missed within seconds."""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import nn

from dnc_dist.base.errors import InputError
from dnc_dist.processes import distributed

_REACH_SECONDS = 5.0


def hub_address(name: str) -> str:
    """Where the hub's library looks for a model, which HF_ENDPOINT may have moved to a mirror."""
    return f"{_hub().ENDPOINT}/{name}"


def _hub() -> Any:
    from huggingface_hub import constants

    return constants


def load_pretrained(name: str, create: Callable[[], nn.Module], address: str | None) -> nn.Module:
    """Collective. The pretrained network, with the same random numbers drawn whether its weights were there already or not.

    Args:
        name: of the network, for messages.
        create: makes it; downloads its weights where they are not in the cache.
        address: of the weights; None: nobody published any.

    Raises:
        InputError: the weights are not here and cannot be had.
    """
    if address is None:
        raise InputError(f"model.weights=pretrained: nobody published weights of {name}; set model.weights to a file, or to none")
    numbers = torch.get_rng_state()
    network = _from_cache(create) if _may_be_cached(address) else None
    if not any(distributed.gather_objects(network is None)):
        assert network is not None
        return network
    problem = None
    if network is None and distributed.local_rank() == 0:
        problem = _fetch(name, create, address)
    if problems := [problem for problem in distributed.gather_objects(problem) if problem]:
        raise InputError(problems[0])
    if network is None:
        torch.set_rng_state(numbers)
        network = create()
    return network


def _may_be_cached(address: str) -> bool:
    """Whether there is a point in looking: the hub's library can be kept from the network, the download of any other address cannot."""
    if address.startswith(_hub().ENDPOINT):
        return True
    return Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(address).path).name).is_file()


def _from_cache(create: Callable[[], nn.Module]) -> nn.Module | None:
    """The network, if its weights are on this machine."""
    with _offline():
        try:
            return create()
        except (OSError, RuntimeError):  # how timm and the hub say that they are not
            return None


@contextmanager
def _offline() -> Iterator[None]:
    """Keep the hub's library from asking the network, which it does for a minute where there is none."""
    constants = _hub()
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _fetch(name: str, create: Callable[[], nn.Module], address: str) -> str | None:
    """Download the weights into the cache; what stands in the way, if anything."""
    from httpx import HTTPError

    reason = _unreachable(address)
    if reason is None:
        try:
            create()
            return None
        except (OSError, RuntimeError, HTTPError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return (
        f"model.weights=pretrained: the weights of {name} are not on this machine and cannot be had from {address} ({reason}); "
        "set model.weights to a .pth or .safetensors file with them, or to none for random ones"
    )


def _unreachable(address: str) -> str | None:
    """Why the network does not lead there; None: it does."""
    parts = urlparse(address)
    host = f"{parts.scheme}://{parts.netloc}"
    try:
        urllib.request.urlopen(urllib.request.Request(host, method="HEAD"), timeout=_REACH_SECONDS).close()
    except urllib.error.HTTPError:
        return None  # it answers
    except OSError as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        # The download may trust other certificates.
        return None if isinstance(reason, ssl.SSLError) else str(reason)
    return None
