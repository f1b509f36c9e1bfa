"""TLS of whoever dials."""

from __future__ import annotations

import os
import ssl

from tierloom.stages.errors import ConfigError


def client_context(ca_file: str = "", cert_file: str = "", key_file: str = "") -> ssl.SSLContext:
    """TLS that verifies the server by the authorities of `ca_file`, else by the system's; with a
    certificate of our own where one is named. Raises ConfigError."""
    try:
        made = ssl.create_default_context(cafile=os.path.expanduser(ca_file) or None)
        if cert_file:
            key = os.path.expanduser(key_file) or None
            made.load_cert_chain(os.path.expanduser(cert_file), key)
    except OSError as error:  # as ssl.SSLError is
        given = {"ca_file": ca_file, "cert_file": cert_file, "key_file": key_file}
        names = ", ".join(f"{option} {file}" for option, file in given.items() if file)
        raise ConfigError(
            f"TLS with {names or 'the authorities of this system'}: {error}; files must be PEM"
        ) from None
    return made
