"""Graphs written in Python, with the checks of a YAML file; to YAML and back.

    from tierloom.graphs import Graph, gather, lookup, put, zstd

    store = Graph() >> "hash" >> lookup("absent") >> "gather" >> "to_host" >> (
        put("hot"), zstd() >> put("warm")
    )
    tierloom.open({"version": 1, "extends": "tiered", "graphs": {"store": store}}, ...)

A graph is the mapping that a file would hold, so whatever reads a file's mapping reads it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass, replace
from typing import Any, get_args, get_type_hints

import yaml

from tierloom.pipeline.config import spec as checked
from tierloom.pipeline.config.coerce import fill, names_of
from tierloom.pipeline.config.load import load_config
from tierloom.pipeline.config.ports import RECEIPT
from tierloom.pipeline.config.presets import VERSION, Source
from tierloom.pipeline.config.problems import Findings, Place, nearest
from tierloom.pipeline.config.resolve import class_of
from tierloom.pipeline.config.yaml_tree import Table, from_python
from tierloom.stages import catalog
from tierloom.stages.contract.stage import PortType, Stage
from tierloom.stages.errors import ConfigError, InputError
from tierloom.stages.options import parse_rate, parse_seconds
from tierloom.stages.tiers.contract.tier import Inner

STAGES = "stages"
_PYTHON = Place("<python>")
_NUMBERLIKE = re.compile(r"[-+.0-9]\S*")


class Steps:
    """Stages one after another, not yet part of a graph."""

    def __init__(self, *steps: Step) -> None:
        self.steps = steps

    def __rshift__(self, after: str | Steps) -> Steps:
        """What reads the last of them."""
        return Steps(*self.steps, *_steps(after).steps)

    def __repr__(self) -> str:
        return " >> ".join(map(str, self.steps))


class Step(Steps):
    """One stage with its options, checked where it is written."""

    def __init__(self, use: str, *values: Any, id: str = "", **options: Any) -> None:
        """`values`: options in the order in which the stage declares them; `id`: its name in the
        graph, by default its tier's or the stage's own. Raises ConfigError."""
        super().__init__(self)
        found = Findings()
        named = from_python({"use": use}, _PYTHON, "", found)
        assert isinstance(named, Table)
        _, cls = class_of("stage", named, "", found)
        found.raise_all()
        assert cls is not None
        names = [f.name for f in fields(cls.Options)]
        if len(values) > len(names):
            raise ConfigError(f"{use} has {len(names)} options, and was given {len(values)} values")
        given = dict(zip(names, values, strict=False))
        if twice := given.keys() & options.keys():
            raise ConfigError(f"{use}: option {min(twice)!r} is given twice")
        self.use, self.options = use, given | options
        tree = from_python(self.options, _PYTHON, "", found)
        assert isinstance(tree, Table)
        wire = names_of(checked.Wire)
        fill(checked.Wire, tree.part(wire), use, found)
        self.parsed = fill(cls.Options, tree, use, found, also=wire)
        """Its options, checked."""
        found.raise_all()
        tier = next((self.options[o] for o in cls.tier_options if o in self.options), None)
        self.id = id or (tier if isinstance(tier, str) and _ends(cls) else use.rpartition(":")[2])
        self.ends = _ends(cls)

    def __repr__(self) -> str:
        return f"{self.use}({', '.join(f'{k}={v!r}' for k, v in self.options.items())})"


class Graph(Mapping[str, Any]):
    """One graph, as a file has it: `deadline`, `on_error`, `pace` and `stages`. Never changes."""

    def __init__(self, **options: Any) -> None:
        """`options`: of the graph, such as `deadline="5 s"`. Raises ConfigError."""
        found = Findings()
        tree = from_python(options, _PYTHON, "", found)
        assert isinstance(tree, Table)
        fill(checked.GraphOptions, tree, "graph", found)
        found.raise_all()
        self._options = options
        self._stages: dict[str, dict[str, Any]] = {}
        self._last: str | None = None
        """Id of the stage that the next one reads; None: the graph's input."""
        self._closed = False

    def __rshift__(self, after: str | Steps | tuple[str | Steps, ...]) -> Graph:
        """A graph that goes on with a stage, several, or a fork: a tuple of branches, all of which
        read the stage before. Raises ConfigError for what is no stage, or reads an end."""
        made = Graph(**self._options)
        made._stages, made._last, made._closed = dict(self._stages), self._last, self._closed
        if made._closed:
            raise ConfigError("nothing can be read after a fork, 'put' or 'scatter': that ends it")
        for branch in after if isinstance(after, tuple) else (after,):
            made._last = self._last
            made._closed = False
            for step in _steps(branch).steps:
                made._add(step)
        made._closed = made._closed or isinstance(after, tuple)
        return made

    def _add(self, step: Step) -> None:
        if self._closed:
            raise ConfigError(f"{step.id!r} has nothing to read: {self._last!r} gives a receipt")
        name, n = step.id, 1
        while name in self._stages:
            n += 1
            name = f"{step.id}-{n}"
        above = next((i for i, s in reversed(self._stages.items()) if not _ends(_class(s))), None)
        source = {} if self._last == above else {"from": self._last}
        self._stages[name] = {"use": step.use, **source, **step.options}
        self._last, self._closed = name, step.ends

    def __getitem__(self, key: str) -> Any:
        return self._stages if key == STAGES else self._options[key]

    def __iter__(self) -> Iterator[str]:
        return iter([*self._options, STAGES])

    def __len__(self) -> int:
        return len(self._options) + 1

    @classmethod
    def of(cls, config: Source | checked.PipelineSpec, name: str) -> Graph:
        """The graph `name` (store or retrieve) of a preset, a file or a mapping, or of a checked
        pipeline. Raises ConfigError."""
        spec = config if isinstance(config, checked.PipelineSpec) else load_config(config)
        if name not in spec.graphs:
            raise ConfigError(f"{spec.name} has no graph {name!r}; {nearest(name, spec.graphs)}")
        return cls._read(as_written(spec)["graphs"][name])

    @classmethod
    def parse(cls, text: str) -> Graph:
        """What `yaml()` has written. Raises ConfigError."""
        try:
            read = yaml.safe_load(text)
        except yaml.YAMLError as e:
            raise ConfigError(f"not YAML: {e}") from None
        if not isinstance(read, Mapping) or not isinstance(read.get(STAGES), Mapping):
            raise ConfigError("a graph is a mapping with `stages`")
        return cls._read(read)

    @classmethod
    def _read(cls, read: Mapping[str, Any]) -> Graph:
        graph = cls(**{k: v for k, v in read.items() if k != STAGES})
        for id, stage in read[STAGES].items():
            if not isinstance(stage, Mapping) or "use" not in stage:
                raise ConfigError(f"stages.{id}: wants a mapping with `use`")
            step = Step(**{"id": id, **{k: v for k, v in stage.items() if k != "from"}})
            graph._stages[id], graph._last = dict(stage), id
            graph._closed = step.ends
        return graph

    def yaml(self) -> str:
        """The graph as a file has it, below its name."""
        return _dumped(dict(self))

    def check(self, name: str = "store") -> Graph:
        """The graph itself, once all is checked as in a file in which its tiers use memory. `name`:
        store or retrieve. Raises ConfigError with every problem."""
        self._checked(name)
        return self

    def _checked(self, name: str) -> checked.PipelineSpec:
        named: dict[str, None] = {}
        for stage in self._stages.values():
            for option in _class(stage).tier_options:
                value = stage.get(option) or []
                named |= dict.fromkeys(value if isinstance(value, list) else [value])
        tiers = {t: {"use": "memory", "capacity": 1 << 20} for t in named}
        whole = {"version": VERSION, "tiers": tiers, "graphs": {name: self}}
        return load_config(whole, said_in="<python>")

    def __repr__(self) -> str:
        return f"<Graph of {', '.join(self._stages) or 'no stages yet'}>"

    def _repr_html_(self) -> str:
        """The graph as a picture; of one with problems, these."""
        from tierloom.pipeline.config.picture import pipeline_svg
        from tierloom.stages.display.drawing import table_html

        try:
            kinds = map(_class, self._stages.values())
            loads = any(kind.touches_engine and _ends(kind) for kind in kinds)
            spec = self._checked("retrieve" if loads else "store")
            tiers = {name: replace(tier, use="tier") for name, tier in spec.tiers.items()}
            return pipeline_svg(replace(spec, tiers=tiers))
        except ConfigError as error:
            return table_html(("not yet whole",), [(line,) for line in str(error).splitlines()])


def stage_named(use: str) -> Any:
    """A function that makes a step of this stage: `put = stage_named("put")`. Raises KeyError."""
    if use not in catalog.names("stage"):
        raise KeyError(use)

    def step(*values: Any, id: str = "", **options: Any) -> Step:
        return Step(use, *values, id=id, **options)

    step.__name__ = step.__qualname__ = use
    step.__doc__ = catalog.load_class("stage", use).Options.__doc__
    return step


def as_written(spec: checked.PipelineSpec) -> dict[str, Any]:
    """A checked pipeline as the mapping of a file that says the same and extends nothing. Secrets
    that its options hold are in it as they are."""
    whole: dict[str, Any] = {"version": VERSION}
    whole |= _options(spec, also=("source", "tiers", "graphs"))
    whole["tiers"] = {
        t.name: {"use": t.use, **_options(t.breaker), **_options(t.options)}
        for t in spec.tiers.values()
    }
    whole["graphs"] = {}
    for graph in spec.graphs.values():
        stages = {
            n.id: {
                "use": n.use, **({"from": n.source} if n.source else {}),
                **_options(n.wire), **_options(n.options),
            }
            for n in graph.nodes
        }  # fmt: skip
        whole["graphs"][graph.name] = {**_options(graph.options), STAGES: stages}
    return whole


def pipeline_yaml(spec: checked.PipelineSpec) -> str:
    """`as_written` as a file's text."""
    return _dumped(as_written(spec))


def _options(options: Any, also: tuple[str, ...] = ()) -> dict[str, Any]:
    """Options that differ from their defaults, as a file has them; without those of `also`."""
    kinds = get_type_hints(type(options), include_extras=True)
    made = {}
    for field in fields(options):
        value = getattr(options, field.name)
        default = field.default
        if default is MISSING and field.default_factory is not MISSING:
            default = field.default_factory()
        if field.name not in also and value != default:
            made[field.name] = _plain(kinds[field.name], value)
    return made


def _plain(kind: Any, value: Any) -> Any:
    """A value as it is written: times and rates with their units."""
    if isinstance(value, Inner):
        return {"use": value.use, **_options(value.options)}
    if is_dataclass(value):
        return _options(value)
    if isinstance(value, Mapping):
        return {k: _plain(None, v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(None, v) for v in value]
    marks = {m for k in (kind, *get_args(kind)) for m in getattr(k, "__metadata__", ())}
    if parse_rate in marks and isinstance(value, int) and value:
        return f"{value} B/s"
    if parse_seconds in marks and isinstance(value, float) and value:
        return f"{value:.12f}".rstrip("0").rstrip(".") + " s"
    return value


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.2 reads as a number and PyYAML does not, as in 1e3."""


def _quoted(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "'" if _NUMBERLIKE.fullmatch(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _quoted)


def _dumped(tree: Any) -> str:
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=100)


def _steps(of: str | Steps) -> Steps:
    if isinstance(of, Steps):
        return of
    if isinstance(of, str):
        return Step(of)
    raise InputError(f"{of!r} is not a stage: write its name, or call it as in put('hot')")


def _class(stage: Mapping[str, Any]) -> type[Stage]:
    return catalog.load_class("stage", stage["use"])


def _ends(cls: type[Stage]) -> bool:
    return PortType.parse(cls.gives).kind == RECEIPT
