"""What `tierloom serve` says of itself at its start: what it keeps where, and who may come in."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Sequence

from tierloom.pipeline.serve.listener import Listen
from tierloom.pipeline.serve.object_store import ObjectStore
from tierloom.stages.display.amounts import size_text
from tierloom.stages.options import masked
from tierloom.stages.user_home import expanded

log = logging.getLogger("tierloom.serve")

_OF_A_CONTAINER = "/run/secrets/"
"""Where a container has its secrets, and one user who reads them."""


def say_what_is_kept(store: ObjectStore) -> None:
    """A line for each tier."""
    for tier in store.tiers:
        held, use = tier.stat(), store.spec.tiers[tier.name].use
        most = f"{size_text(held.capacity)} at most" if held.capacity else "no limit is known"
        works = "" if tier.available else "; it does not work yet"
        log.info(
            "keeps in %s: %s%s, %s; %d objects, %s%s", tier.name, use,
            f" at {masked(tier.address)}" if tier.address else "", most, held.objects,
            size_text(held.nbytes), works,
        )  # fmt: skip


def warn_of_access(listens: Sequence[Listen], token: bytes, token_file: str) -> None:
    """Who may come in, and what of it is unsafe."""
    for listen in listens:
        who = "this user" if listen.path else "this host" if listen.is_local else "every host"
        log.info("%s: %s, %s", listen, who, "with the token" if token else "without a token")
        if listen.is_local:
            continue
        if not token:
            log.warning("%s: any host that reaches it may read, put and delete", listen)
        if not listen.tls:
            log.warning("%s: KV crosses the network in plain: use tls://, or a network of its own",
                        listen)  # fmt: skip
    if not token_file or token_file.startswith(_OF_A_CONTAINER):
        return
    try:
        mode = os.stat(expanded(token_file)).st_mode
    except OSError:
        return
    if stat.S_IMODE(mode) & 0o044:
        log.warning("token file %s can be read by other users: chmod 600", token_file)
