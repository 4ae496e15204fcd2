"""From the tables of a spec to the three conditionals of a `VAE`."""

from fnmatch import fnmatchcase
from typing import Any

from ppl_vae import families, networks
from ppl_vae.data.columns import Columns
from ppl_vae.families.conditional import Conditional
from ppl_vae.networks.encoding import Encoding
from ppl_vae.programs.given import Given
from ppl_vae.programs.program import load_network
from ppl_vae.programs.vae import VAE
from ppl_vae.runs.schema import ROLES, described, filled, needs
from ppl_vae.runs.spec_file import near


def assemble(spec: Any, columns: Columns, latent: int, rows: int, *, own: bool = True) -> VAE:
    """Build the three conditionals, those last that are tied to others; for a trial without networks of one's own.

    Args:
        spec: its tables.
        columns: of the data.
        latent: number of latent variables.
        rows: number of training data.
        own: whether networks of one's own are built, or a `Linear` in their place.
    """
    parts: dict[str, Any] = {}
    if tied_to(spec.prior) and tied_to(spec.posterior):
        raise ValueError(
            f"Expected a {spec.prior.family} beside a posterior that is not tied to the prior; got "
            f"{spec.posterior.family}."
        )
    known, given = described(columns), _given(spec, columns)
    more = {role: (given.size,) if given and role in given.roles else () for role in ROLES}
    for role in sorted(ROLES, key=lambda role: len(tied_to(getattr(spec, role)))):
        table = getattr(spec, role)
        kind = getattr(families, table.family)
        network: Any = getattr(table, "network", None)
        event = columns.count if role == "likelihood" else latent
        keys = table.model_dump(exclude={"family", "network", "encoding"})
        family = kind(**filled(kind, event=event, **known, **parts), **keys)
        context: tuple[int, ...] = {"prior": (), "likelihood": (latent,), "posterior": (columns.count,)}[role]
        context += more[role]
        encoding = guide_encoding(table, parts["likelihood"].family, columns) if role == "posterior" else None
        if hasattr(network, "program"):
            kind = load_network(network.program) if own else networks.Linear
            size = sum(context) + (0 if encoding is None else encoding.size - columns.count)
            sizes = filled(kind, context=size, outputs=family.start().numel(), shape=columns.shape)
            network = kind(**sizes, **(network.model_dump(exclude={"program"}) if own else {}))
        elif network is not None:
            kind = getattr(networks, network.family)
            network = kind(**filled(kind, rows=rows, **known), **network.model_dump(exclude={"family"}))
        parts[role] = Conditional(family, network, encoding=encoding).bind(*context)
    return VAE(**parts, given=given)


def _given(spec: Any, known: Columns) -> Given | None:
    """What the parts are conditioned on, if anything, by the label and the covariates of the data."""
    names, levels = as_list(spec.model.given), known.given or {}
    if not names:
        return None
    for name in names:
        if name not in levels:
            what = "labels" if name == "y" else "covariates"
            raise ValueError(f'Expected {what} in the data, for model.given = "{name}"; got data without.')
    count, columns = levels["y"][0] if "y" in names else None, levels["covariates"] if "covariates" in names else ()
    return Given(y=count, covariates=columns, to=as_list(spec.model.given_to))


def as_list(names: str | list[str] | None) -> list[str]:
    """A list of the names given, one or several or none."""
    return [names] if isinstance(names, str) else list(names or ())


def guide_encoding(table: Any, family: families.Family, columns: Columns) -> Encoding | None:
    """What the guide's network sees of each column: as the likelihood's family suggests, or as the table says.

    Columns with missing entries have an indicator, and others than plain ones are standardised beside them; a network
    of pictures has a place for neither.
    """
    given, words = getattr(table, "encoding", None), list(family.encodings)
    indicators = [j for j, share in enumerate(columns.missing or ()) if share]
    if indicators and _of_pictures(table):
        indicators = []
    elif indicators:
        words = ["standardise" if word == "plain" else word for word in words]
    names = columns.names or tuple(map(str, range(columns.count)))
    for pattern, word in (given if isinstance(given, dict) else {"*": given} if given else {}).items():
        matched = [j for j, name in enumerate(names) if name == pattern or fnmatchcase(name, pattern)]
        if not matched:
            raise ValueError(f"Expected the names of columns in `encoding`; got {pattern!r}.{near(pattern, names)}")
        for j in matched:
            words[j] = word
    amortized = getattr(table, "network", None) is not None and not on_table(table)
    plain = set(words) == {"plain"} and not indicators
    return Encoding(words, columns.levels or (), indicators) if amortized and not plain else None


def _of_pictures(table: Any) -> bool:
    """Whether a part's network takes the shape of a picture."""
    network: Any = getattr(table, "network", None)
    if hasattr(network, "program"):
        return "shape" in needs(load_network(network.program))
    return network is not None and "shape" in needs(getattr(networks, network.family))


def on_table(part: Any) -> bool:
    """Whether a part keeps one row per datum."""
    family = getattr(getattr(part, "network", None), "family", None)
    return family is not None and "rows" in needs(getattr(networks, family))


def on_columns(part: Any) -> bool:
    """Whether a part has to know the columns of the data, by name or kind."""
    return "columns" in needs(getattr(families, part.family))


def tied_to(part: Any) -> set[str]:
    """The other roles that a part is made of."""
    return needs(getattr(families, part.family)) & set(ROLES)
