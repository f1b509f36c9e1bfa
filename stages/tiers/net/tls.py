"""TLS of whoever dials."""

from __future__ import annotations

import ssl

from tierloom.stages.errors import ConfigError
from tierloom.stages.user_home import expanded


def client_context(ca_file: str = "", cert_file: str = "", key_file: str = "") -> ssl.SSLContext:
    """TLS that verifies the server by the authorities of `ca_file`, else by the system's; with a
    certificate of our own where one is named. Raises ConfigError."""
    ca, cert, key = (expanded(file) if file else None for file in (ca_file, cert_file, key_file))
    try:
        made = ssl.create_default_context(cafile=ca)
        if cert is not None:
            made.load_cert_chain(cert, key)
    except OSError as error:  # as ssl.SSLError is
        given = {"ca_file": ca_file, "cert_file": cert_file, "key_file": key_file}
        names = ", ".join(f"{option} {file}" for option, file in given.items() if file)
        raise ConfigError(
            f"TLS with {names or 'the authorities of this system'}: {error}; files must be PEM"
        ) from None
    return made
