"""What was measured, as markdown, beside what it is held to. Nothing fails by a bar: it tells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bars import Bar

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

BARS = (
    Bar("^store redis$", "cpu_s_per_gb", True, 0.70, "CPU s/GB"),
    Bar("^retrieve redis$", "cpu_s_per_gb", True, 0.65, "CPU s/GB"),
    Bar("^retrieve server-tcp$", "cpu_s_per_gb", True, 0.65, "CPU s/GB"),
    Bar("^retrieve server-shared$", "cpu_s_per_gb", True, 0.20, "CPU s/GB"),
    Bar("^bare (s3|nixl-posix|nixl-obj|mooncake)$", "ratio", True, 1.3, "x bare"),
    Bar("^lookup (redis|server-(tcp|unix|shared))$", "p50", True, 1.5, "ms"),
    Bar("^(faults|failover) ", "late", True, 50, "ms late"),
    Bar("^(faults|failover) ", "next", True, 50, "ms next"),
    Bar("^faults ", "back", True, 2, "s"),
    Bar("^failover ", "back", True, 5, "s"),
)
"""By what is measured, and the tier."""
BOTH = ("store", "retrieve")


def markdown(run: Mapping[str, Any]) -> str:
    m = run["machine"]
    about = (
        f"{m['cpu']}, {m['cores']} cores, Linux {m['kernel']}, Python {m['python']}, torch "
        f"{m['torch']}; {run['day']}; load {m['load']} before, {run['load_after']} after."
    )
    packages = ", ".join(f"{name} {version}" for name, version in m["packages"].items())
    means = (
        f"Servers and clients on this machine; medians over {run['rounds']} rounds. GB is 1e9 "
        "bytes of KV. What each figure means: `benchmarks/README.md`."
    )
    lines = ["# Remote tiers", "", about, "", packages + ".", "", means]
    for make in (copies, bare, lookup, faults, without):
        lines += make(run)
    return "\n".join(lines) + "\n"


def copies(run: Mapping[str, Any]) -> list[str]:
    return table(
        "Store and retrieve",
        "2,048 tokens of Llama-3.1-8B through the public API: 8 objects of 32 MiB, checksums "
        "included. CPU s/GB: of the client and all of the tier's servers. As many bytes from "
        f"socket to socket over TCP, and no more, take {run['sockets']:.3f} of both ends.",
        ("tier", "", "GB/s", "of memcpy", "CPU s/GB", "client", "servers", "memcpy", "bar"),
        (
            (
                tier, what,
                *cells(of[what], "{:.2f}", "gb_per_s", "of_memcpy"),
                *cells(of[what], "{:.3f}", "cpu_s_per_gb", "client", "server"),
                *cells(of[what], "{:.3f}", "memcpy_cpu_s_per_gb"),
                verdict(f"{what} {tier}", of[what]),
            )
            for tier, of in run["tiers"].items() for what in BOTH if what in of
        ),
    )  # fmt: skip


def bare(run: Mapping[str, Any]) -> list[str]:
    return table(
        "Beside the bare client",
        "The same 8 objects by the tier alone and by the client that comes with its store, in "
        "turns. CPU s/GB: of the client's process; the ratio is the median of the rounds' own.",
        ("tier", "", "CPU s/GB", "bare", "ratio", "GB/s", "bare", "bar"),
        (
            (
                tier, what,
                *cells(of["bare"][what], "{:.3f}", "cpu_s_per_gb", "bare_cpu_s_per_gb"),
                *cells(of["bare"][what], "{:.2f}", "ratio", "gb_per_s", "bare_gb_per_s"),
                verdict(f"bare {tier}", of["bare"][what]),
            )
            for tier, of in run["tiers"].items() if "bare" in of for what in BOTH
        ),
    )  # fmt: skip


def lookup(run: Mapping[str, Any]) -> list[str]:
    return table(
        "Lookup of 64 chunks",
        "Milliseconds until the tier has answered; and a whole lookup, whose 16,384 tokens are "
        "hashed first.",
        ("tier", "p50", "p99", "whole, p50", "times", "bar"),
        (
            (
                tier, *cells(of["lookup"], "{:.2f}", "p50", "p99", "whole"),
                *cells(of["lookup"], "{}", "times"), verdict(f"lookup {tier}", of["lookup"]),
            )
            for tier, of in run["tiers"].items() if "lookup" in of
        ),
    )  # fmt: skip


def faults(run: Mapping[str, Any]) -> list[str]:
    return table(
        "A server that fails",
        "Time limits are the presets'. The first retrieve waits for the server; the ten are those "
        "after the breaker has opened. Back: until a new prompt is stored and found again, since "
        "the server is back; in a failover, since the master was killed.",
        ("tier", "", "deadline", "first", "late", "longest of ten", "back after", "bars"),
        (
            (
                tier, what, *cells(one, "{:.0f} ms", "deadline", "first", "late", "next"),
                *cells(one, "{:.2f} s", "back"), verdict(f"{kind} {tier}", one),
            )
            for tier, of in run["tiers"].items() for kind in ("faults", "failover")
            for what, one in of.get(kind, {}).items()
        ),
    )  # fmt: skip


def without(run: Mapping[str, Any]) -> list[str]:
    return table(
        "Without figures",
        "Not installed; or refused, because other bytes came back, or not all, or it failed.",
        ("tier", "", "why"),
        (
            (tier, why, " ".join(of[why].split()))
            for tier, of in run["tiers"].items() for why in ("missing", "refused") if why in of
        ),
    )  # fmt: skip


def table(
    title: str, note: str, columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]
) -> list[str]:
    """Nothing, where there are no rows."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    head = ["", f"## {title}", "", note, "", "| " + " | ".join(columns) + " |"]
    return [*head, "|---" * len(columns) + "|", *lines] if lines else []


def cells(figures: Mapping[str, float], text: str, *keys: str) -> list[str]:
    return [text.format(figures[key]) for key in keys]


def verdict(name: str, figures: dict[str, float]) -> str:
    return "; ".join(
        f"{bar}: {'met' if bar.met(figures) else 'MISSED'}"
        for bar in BARS if bar.fits(name, figures)
    )  # fmt: skip
