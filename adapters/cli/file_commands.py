"""`tierloom check`, `explain` and `doctor`, for people and as JSON; options of other commands."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tierloom.adapters.demo.screen import STDOUT
from tierloom.stages.errors import ConfigError
from tierloom.stages.options import masked

if TYPE_CHECKING:
    from tierloom.pipeline.config.problems import ConfigProblems

Config = Annotated[str, typer.Argument(help="A preset's name (tiered) or a YAML file (./my.yaml).")]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON, for programs.")]


def writable(path: Path | None) -> Path | None:
    """A callback of options that name a file to write, or `-`: what could not be written after
    minutes of work is refused before it. Raises ConfigError."""
    if path is None or path == STDOUT:
        return path
    there = path.exists()
    try:
        with path.open("ab"):
            pass
    except OSError as e:
        raise ConfigError(f"cannot write {path}: {e.strerror}") from None
    if not there:
        path.unlink()
    return path


def writable_or_stdout(path: Path | None) -> Path | None:
    """As `writable`, for commands that write to stdout where no file is named, or `-`."""
    return None if path == STDOUT else writable(path)


def set_options(settings: Sequence[str] | None) -> dict[str, Any]:
    """KEY=VALUE, the value as JSON or else as it is. Raises ConfigError."""
    found: dict[str, Any] = {}
    for setting in settings or []:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {setting}: write KEY=VALUE, as in tiers.hot.capacity='8 GiB'")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


def check(config: Config, as_json: AsJson = False) -> None:
    """Check a pipeline file and report every problem at once.

    Exits with 0 if it can run (warnings are printed), with 2 if it cannot.
    """
    from tierloom.pipeline.config.load import load_config, memory_here, warnings
    from tierloom.pipeline.config.problems import ConfigProblems, Problem
    from tierloom.pipeline.config.room import room_warnings

    def rows(found: tuple[Problem, ...]) -> list[dict[str, Any]]:
        return [{name: getattr(p, name) for name in Problem.__slots__} for p in found]

    try:
        spec = load_config(config)
    except ConfigProblems as e:
        e = _of_lmcache(config) or e
        if not as_json:
            raise e from None
        _print({"ok": False, "problems": rows(e.problems)})
        sys.exit(2)
    told = warnings(spec) + room_warnings(spec, memory_here())
    if as_json:
        parts = {"tiers": list(spec.tiers), "graphs": list(spec.graphs)}
        _print({"ok": True, "source": spec.source, **parts, "warnings": rows(told)})
        return
    for problem in told:
        typer.echo(f"warning: {problem}", err=True)
    said = f"tiers: {', '.join(spec.tiers) or 'none'}; graphs: {', '.join(spec.graphs)}"
    typer.echo(f"{spec.source}: ok ({said})")


def _of_lmcache(config: str) -> ConfigProblems | None:
    """What is wrong with a file of LMCache's is one thing, not each of its keys."""
    from tierloom.adapters.lmcache.options import is_lmcache
    from tierloom.pipeline.config.problems import ConfigProblems, Findings, Place

    if not is_lmcache(Path(config).expanduser()):
        return None
    found = Findings()
    hint = f"convert it: tierloom import-lmcache {config} --out tierloom.yaml"
    found.add(Place(config), "", "is a configuration of LMCache's", hint)
    return ConfigProblems(found.sorted())


def explain(
    config: Config,
    mermaid: Annotated[bool, typer.Option("--mermaid", help="As a Mermaid flowchart.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a pipeline does: its tiers, its graphs, and how they are cut into segments."""
    from tierloom.pipeline.config import explain as words
    from tierloom.pipeline.config.load import load_config
    from tierloom.pipeline.config.problems import ConfigProblems

    try:
        spec = load_config(config)
    except ConfigProblems as e:
        raise _of_lmcache(config) or e from None
    if as_json:
        from tierloom.pipeline.graph_in_python import as_written

        _print({"source": spec.source, **_without_secrets(as_written(spec))})
        return
    typer.echo(words.mermaid(spec) if mermaid else words.explain(spec))


def doctor(as_json: AsJson = False) -> None:
    """Inspect this machine: what tierloom can use here, what is missing, and how to get it."""
    from tierloom.adapters.cli.doctor import findings, report

    if as_json:
        _print([{"name": name, **finding._asdict()} for name, finding in findings()])
    else:
        report()


def _print(tree: Any) -> None:
    typer.echo(json.dumps(tree, indent=2))


def _without_secrets(tree: Any, name: str = "") -> Any:
    """As `masked`, value by value."""
    if isinstance(tree, Mapping):
        return {key: _without_secrets(value, key) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_without_secrets(value, name) for value in tree]
    return masked(f"{name}: {tree}")[len(name) + 2 :] if isinstance(tree, str) else tree
