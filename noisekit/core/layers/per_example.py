"""Squared norms of per-example gradients of a model's parameters, from captured calls.

Every parameter is read at a *site*: the smallest module whose own call accounts for
the parameter's whole gradient, by a layer rule or by replay. What several sites or
several calls add to one parameter is added up before squaring.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from noisekit.core.layers.convolution import ConvRule
from noisekit.core.layers.embedding import EmbeddingRule
from noisekit.core.layers.linear import LinearRule, TransposedLinearRule
from noisekit.core.layers.normalisation import ChannelNormRule, FeatureNormRule
from noisekit.core.layers.recurrent import RecurrentReplay
from noisekit.core.layers.replay import ModuleReplay
from noisekit.core.layers.rule import (
    LayerCall,
    LayerRule,
    added_up,
    row_slices,
    row_sq_norms,
    sub_slices,
    widen,
)
from noisekit.core.layers.shared_weights import shared_weight_sq_norms

RULES: tuple[LayerRule, ...] = (
    LinearRule(),
    TransposedLinearRule(),
    ConvRule(),
    FeatureNormRule(),
    ChannelNormRule(),
    EmbeddingRule(),
)

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """Where some parameters' per-example gradients are read, and how.

    Attributes:
        path: The module's name in the model; empty for the model itself.
        module: The module.
        rule: How its calls are read.
        params: The parameters read here, by their names inside the module.
    """

    path: str
    module: nn.Module
    rule: LayerRule
    params: Mapping[str, nn.Parameter]

    def name_of(self, parameter: nn.Parameter) -> str:
        """The name of ``parameter`` inside the module."""
        return next(name for name, p in self.params.items() if p is parameter)


def coupling(module: nn.Module) -> str:
    """Say why ``module`` makes an example's gradient depend on the others, if so."""
    if isinstance(module, _BatchNorm):
        own = not module.training and module.running_mean is not None
        return "" if own else "BatchNorm in training mode"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.scale_grad_by_freq:
        return "scale_grad_by_freq=True"
    return ""


def assign_sites(
    model: nn.Module, parameters: Sequence[nn.Parameter]
) -> tuple[Site, ...]:
    """Return where each of ``parameters`` is read.

    A shared parameter is read at every layer that owns it where all of those have
    rules, and else at the smallest module that holds all of them.
    """
    wanted = {id(parameter) for parameter in parameters}
    homes: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in wanted:
            homes.setdefault(id(parameter), []).append(name)
    placed: dict[str, list[str]] = {}
    for names in homes.values():
        for path, name in _places(model, names):
            placed.setdefault(path, []).append(name)
    return tuple(_site(model, path, names) for path, names in placed.items())


def replay_site(
    model: nn.Module, path: str, parameters: Sequence[nn.Parameter]
) -> Site:
    """Return the site that reads ``parameters`` by replaying the module at ``path``."""
    module = model.get_submodule(path)
    wanted = {id(parameter) for parameter in parameters}
    params = {n: p for n, p in module.named_parameters() if id(p) in wanted}
    return Site(path, module, ModuleReplay(), params)


def enclosing_path(model: nn.Module, paths: Sequence[str]) -> str:
    """Return the path of the smallest module with a forward around all ``paths``."""
    alone = len(paths) == 1
    path = paths[0].rpartition(".")[0] if alone else _common_path(paths)
    return _with_forward(model, path)


def example_sq_norms(
    contributions: Sequence[tuple[Site, LayerCall]], parameter: nn.Parameter
) -> Tensor:
    """Return ``|u_i|²`` of one parameter, all its calls together: cross terms count."""
    if len(contributions) == 1:
        site, call = contributions[0]
        name = site.name_of(parameter)
        return site.rule.sq_norms(call, (name,))[name]
    if all(site.name_of(parameter) == "weight" for site, _ in contributions):
        rules = [(site.rule, call) for site, call in contributions]
        norms = shared_weight_sq_norms(rules)
        if norms is not None:
            return norms
    chunks = _chunks(contributions, parameter)
    return torch.cat([row_sq_norms(grads) for grads in chunks])


def summed_grads(
    contributions: Sequence[tuple[Site, LayerCall]],
    parameter: nn.Parameter,
    first: int = 0,
) -> Tensor:
    """Return ``sum_i u_i`` of one parameter, which should equal its gradient.

    From the gradients of single examples, as many from ``first`` on as are held at a
    time, so that a mistaken split into examples shows; and of all others together.
    """
    num_examples = contributions[0][1].num_examples
    first = first % num_examples
    single = next(sub_slices(slice(first, num_examples), parameter.numel()))
    others = (slice(0, first), slice(single.stop, num_examples))
    parts = [_example_grads(contributions, parameter, single).sum(0)]
    parts += [
        sum_over_rows(contributions, parameter, rows)
        for rows in others
        if rows.start < rows.stop
    ]
    return added_up(parts)


def sum_over_rows(
    contributions: Sequence[tuple[Site, LayerCall]],
    parameter: nn.Parameter,
    rows: slice,
) -> Tensor:
    """Return the sum of ``u_i`` over the examples ``rows``, at one gradient's cost."""
    return added_up(
        site.rule.summed_grads(call, (name,), rows)[name]
        for site, call in contributions
        for name in (site.name_of(parameter),)
    )


def square_sums(
    contributions: Sequence[tuple[Site, LayerCall]], parameter: nn.Parameter
) -> Tensor:
    """Return ``sum_i u_i²`` element by element, all calls of the parameter together."""
    if len(contributions) == 1:
        site, call = contributions[0]
        name = site.name_of(parameter)
        return site.rule.square_sums(call, (name,))[name]
    chunks = _chunks(contributions, parameter)
    return added_up(widen(grads).square().sum(0) for grads in chunks)


def _chunks(
    contributions: Sequence[tuple[Site, LayerCall]], parameter: nn.Parameter
) -> Iterator[Tensor]:
    """Yield per-example gradients, a few examples at a time."""
    num_examples = contributions[0][1].num_examples
    for rows in row_slices(num_examples, parameter.numel()):
        yield _example_grads(contributions, parameter, rows)


def _example_grads(
    contributions: Sequence[tuple[Site, LayerCall]],
    parameter: nn.Parameter,
    rows: slice,
) -> Tensor:
    """Gradients of the examples ``rows``, all calls of the parameter together."""
    parts = [
        site.rule.example_grads(call, (name,), rows)[name]
        for site, call in contributions
        for name in (site.name_of(parameter),)
    ]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def _site(model: nn.Module, path: str, names: Sequence[str]) -> Site:
    """The site at ``path`` for the parameters ``names`` (names in the model)."""
    module = model.get_submodule(path)
    start = len(path) + 1 if path else 0
    params = {name[start:]: model.get_parameter(name) for name in names}
    own = set(params) <= set(module._parameters)
    rule = _rule_for(module) if own else None
    if rule is None and own and RecurrentReplay.fits(module):
        rule = RecurrentReplay()
    return Site(path, module, rule or ModuleReplay(), params)


def _places(model: nn.Module, names: list[str]) -> list[tuple[str, str]]:
    """Paths of the sites of one parameter, each with the name it has there."""
    places = [(_calling_module(model, name), name) for name in names]
    paths = {path for path, _ in places}
    if len(paths) == 1:
        return places[:1]
    own = all(path == name.rpartition(".")[0] for path, name in places)
    if own and all(_rule_for(model.get_submodule(path)) for path in paths):
        return places
    return [(_common_path([path for path, _ in places]), names[0])]


def _calling_module(model: nn.Module, name: str) -> str:
    """Path of the smallest module whose call uses the parameter called ``name``."""
    path = name.rpartition(".")[0]
    head, found, _ = f".{path}.".partition(".parametrizations.")
    if found:
        path = head.strip(".")
    parts = path.split(".") if path else []
    for depth in range(len(parts)):
        outer = ".".join(parts[:depth])
        if isinstance(model.get_submodule(outer), nn.MultiheadAttention):
            return outer  # it uses its projection's weights, never calls it
    return _with_forward(model, path)


def _with_forward(model: nn.Module, path: str) -> str:
    while path and isinstance(model.get_submodule(path), _CONTAINERS):
        path = path.rpartition(".")[0]
    return path


def _rule_for(module: nn.Module) -> LayerRule | None:
    return next((rule for rule in RULES if rule.applies(module)), None)


def _common_path(paths: Sequence[str]) -> str:
    common = []
    for parts in zip(*(path.split(".") for path in paths), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)
