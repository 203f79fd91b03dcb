"""Where a model's parameters are read, and where instead once that has failed."""

from collections import Counter
from collections.abc import Mapping, Sequence

from torch import nn

from noisekit.core.layers.broadcast import BroadcastRule
from noisekit.core.layers.per_example import (
    Site,
    assign_sites,
    enclosing_path,
    replay_site,
)
from noisekit.core.layers.replay import ModuleReplay

_LISTED = 5


def some_of(names: Sequence[str]) -> str:
    """Return the names for a message, of many the first few and how many more."""
    listed = ", ".join(names[:_LISTED])
    more = len(names) - _LISTED
    return f"{listed} and {more} more" if more > 0 else listed


class SitePlan:
    """Assigns parameters to sites, and widens a site that does not account for one.

    A site is widened to the module around it, which is replayed, until the whole
    model is. Changes take effect at ``refresh``, between two forward passes.

    Attributes:
        sites: Where the parameters are read now.
        stale: Whether there are changes that wait for ``refresh``.
        left_out: By index of a parameter that is read nowhere any more: why.
        broadcast: By index of a parameter that is read where it is broadcast over the
            examples: its site, and its name there.
    """

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter]
    ) -> None:
        self._model = model
        self._parameters = dict(parameters)
        self._replayed: dict[int, str] = {}
        self._failures: Counter[int] = Counter()
        self._replay_only: set[int] = set()
        self.left_out: dict[int, str] = {}
        self.broadcast: dict[int, tuple[Site, str]] = {}
        self.stale = False
        self._assign()

    def _assign(self) -> None:
        parameters = list(self._parameters.values())
        elsewhere = {*self._replayed, *self.left_out, *self.broadcast}
        plain = [p for i, p in enumerate(parameters) if i not in elsewhere]
        groups: dict[str, list[nn.Parameter]] = {}
        for index, path in self._replayed.items():
            if index not in self.left_out:
                groups.setdefault(path, []).append(parameters[index])
        assigned = []
        for site in assign_sites(self._model, plain):
            if isinstance(site.rule, ModuleReplay) and site.path in groups:
                groups[site.path].extend(site.params.values())  # one replay for both
            else:
                assigned.append(site)
        self.sites: tuple[Site, ...] = (
            *assigned,
            *(replay_site(self._model, path, group) for path, group in groups.items()),
        )
        self._sites_of = [
            [s for s in self.sites if any(p is q for q in s.params.values())]
            for p in parameters
        ]
        for index, (site, _) in self.broadcast.items():
            self._sites_of[index] = [site]
        self._sole_names: dict[Site, tuple[str, ...]] = {}

    def bare(self) -> dict[int, tuple[Site, str]]:
        """Parameters of replayed modules that may be read where they are broadcast."""
        return {
            index: (sites[0], sites[0].name_of(parameter))
            for index, (parameter, sites) in enumerate(
                zip(self._parameters.values(), self._sites_of, strict=True)
            )
            if len(sites) == 1
            and isinstance(sites[0].rule, ModuleReplay)
            and index not in self._replayed
            and index not in self._replay_only
        }

    def read_broadcast(self, index: int) -> Site:
        """Read a bare parameter where it is broadcast, from this pass on."""
        if index not in self.broadcast:
            site, name = self.bare()[index]
            own = Site(
                site.path, site.module, BroadcastRule(), {name: site.params[name]}
            )
            self.broadcast[index] = (own, name)
            self._sites_of[index] = [own]
            self._sole_names = {}
            self.stale = True
        return self.broadcast[index][0]

    def replay_instead(self, index: int) -> bool:
        """Read a parameter by replaying its module; return whether that is news."""
        self._replay_only.add(index)
        if self.broadcast.pop(index, None) is None:
            return False
        self.stale = True
        return True

    def forget_broadcasts(self) -> None:
        """Look anew where parameters are broadcast: the model is another one."""
        self.broadcast = {}
        self._replay_only = set()
        self.stale = True

    def sites_of(self, index: int) -> list[Site]:
        """The sites that add to the parameter with this index."""
        return self._sites_of[index]

    def indices_of(self, site: Site) -> list[int]:
        """The parameters read at ``site``."""
        return [i for i, sites in enumerate(self._sites_of) if site in sites]

    def sole_names(self, site: Site) -> tuple[str, ...]:
        """Names, inside the module, of parameters that only ``site`` reads."""
        if site not in self._sole_names:
            parameters = list(self._parameters.values())
            sole = [i for i in self.indices_of(site) if len(self._sites_of[i]) == 1]
            self._sole_names[site] = tuple(site.name_of(parameters[i]) for i in sole)
        return self._sole_names[site]

    def widen(self, indices: Sequence[int]) -> bool:
        """Read these parameters at a larger module; return whether there was one."""
        widened = False
        for index in indices:
            sites = self._sites_of[index]
            if not sites:
                continue
            if self.replay_instead(index):
                widened = True
                continue
            if index in self._replayed and self._replayed[index] != sites[0].path:
                continue  # widened before in this pass
            if not sites[0].path and isinstance(sites[0].rule, ModuleReplay):
                continue
            paths = [site.path for site in sites]
            self._replayed[index] = enclosing_path(self._model, paths)
            widened = self.stale = True
        return widened

    def leave_out(self, indices: Sequence[int], reason: str, *, after: int = 1) -> None:
        """Stop reading parameters that have failed at the whole model.

        Args:
            indices: The parameters.
            reason: Why they cannot be read.
            after: Failures, this one included, from which on they are left out.
        """
        self._failures.update(indices)
        for index in indices:
            if self._failures[index] >= after and index not in self.left_out:
                self.left_out[index] = reason
                self.stale = True

    @property
    def replayed(self) -> dict[str, str]:
        """Paths of the modules replayed for parameters that were widened, by name."""
        names = list(self._parameters)
        return {names[index]: path for index, path in self._replayed.items()}

    @property
    def named_left_out(self) -> dict[str, str]:
        """Why parameters are read nowhere any more, by name."""
        names = list(self._parameters)
        return {names[index]: reason for index, reason in self.left_out.items()}

    def replay(
        self, paths: Mapping[str, str], *, left_out: Mapping[str, str] | None = None
    ) -> None:
        """Widen and leave out as another plan of the same model has."""
        names = list(self._parameters)
        self._replayed = {names.index(name): path for name, path in paths.items()}
        self.left_out = {names.index(n): why for n, why in (left_out or {}).items()}
        self.broadcast = {}
        self.stale = True

    def refresh(self) -> bool:
        """Put changes into effect; return whether there were any."""
        if not self.stale:
            return False
        self._assign()
        self.stale = False
        return True

    def coverage(self) -> dict[str, str]:
        """How each parameter is read: by a layer's rule, or by replaying what."""
        found = {}
        for index, name in enumerate(self._parameters):
            sites = self._sites_of[index]
            ways = {
                site.rule.name
                if site.rule.name != ModuleReplay.name
                else f"replay of {site.path or 'the model'}"
                for site in sites
            }
            shared = ", shared" if len(sites) > 1 else ""
            found[name] = " and ".join(sorted(ways)) + shared or "not read"
        return found
