"""Directions that the user gives, as units: steering vectors, probes, decoder rows of an SAE.

Patching a direction v of a site replaces the site's component along v by the source run's:
y <- y + v (v . (y' - y)). With the unit vectors of an orthonormal basis this is the patch of that
basis's coordinates; a neuron is a direction along one axis of the site `neuron`.
"""

import dataclasses
import hashlib
import os
import zipfile
import zlib

import numpy as np

from models.config import DecoderConfig
from models.errors import InputError
from models.sites import Site

# A vector's length may differ from 1 by as much as float16 storage rounds it.
_TOLERANCE = 1e-2
_SITES = (Site.RESIDUAL, Site.LAYER, Site.ATTENTION, Site.MLP, Site.HEAD, Site.NEURON)


@dataclasses.dataclass(frozen=True)
class SiteDirections:
    """The directions of one site, U of them, in the order of their layers.

    Attributes:
        layers, numbers: layer of each, and its place among those of that layer, int32 [U].
        vectors: of length 1, float32 [U, size of the site].
    """

    layers: np.ndarray
    numbers: np.ndarray
    vectors: np.ndarray


@dataclasses.dataclass(frozen=True)
class Directions:
    """Unit vectors by site, layer and number.

    Attributes:
        sites: the sites that have any; the order of the results' site axis.
        of_site: their directions.
        given: which exist, [L, site, K] with K the largest number of any site and layer.
        hash: of all of them.
    """

    sites: tuple[Site, ...]
    of_site: tuple[SiteDirections, ...]
    given: np.ndarray
    hash: str


def site_size(config: DecoderConfig, site: Site) -> int:
    """Length of a direction of a site; heads are laid end to end."""
    if site == Site.HEAD:
        return config.num_heads * config.head_dim
    return config.intermediate_size if site == Site.NEURON else config.hidden_size


def read(path: str | os.PathLike, config: DecoderConfig) -> Directions:
    """Directions from an npz file.

    Its arrays are named SITE.LAYER, as residual.12, and hold one unit vector [size] or several
    [K, size]. They are scaled to length 1 exactly.

    Raises:
        InputError: the file cannot be read; an array's name, shape or a vector's length is not as
            above.
    """
    arrays = _arrays(path)
    found = {_place(path, name, config): (name, array) for name, array in arrays.items()}
    sites = tuple(site for site in _SITES if any(site == key[0] for key in found))
    most = max(len(array) for _, array in found.values())
    given = np.zeros((config.num_layers, len(sites), most), bool)
    parts = {site: [] for site in sites}
    for site, layer in sorted(found):
        name, array = found[site, layer]
        vectors = _unit(path, name, array, site_size(config, site)).astype(np.float32)
        numbers = np.arange(len(vectors), dtype=np.int32)
        parts[site].append((np.full_like(numbers, layer), numbers, vectors))
        given[layer, sites.index(site), numbers] = True
    of_site = tuple(
        SiteDirections(*map(np.concatenate, zip(*parts[site], strict=True))) for site in sites
    )
    digest = hashlib.sha256(repr(sites).encode() + given.tobytes())
    for directions in of_site:
        digest.update(directions.vectors.tobytes())
    return Directions(sites, of_site, given, digest.hexdigest())


def _arrays(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """What the file holds, each array as [K, size]."""
    try:
        with zipfile.ZipFile(path), np.load(path, allow_pickle=False) as file:
            arrays = {name: np.atleast_2d(file[name]) for name in file.files}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: no npz file of plain arrays ({error})") from None
    if not arrays or not all(array.size for array in arrays.values()):
        raise InputError(f"{path}: it has no vectors, or an array of none")
    return arrays


def _place(path: str | os.PathLike, name: str, config: DecoderConfig) -> tuple[Site, int]:
    site, _, layer = name.partition(".")
    if site not in _SITES or layer not in map(str, range(config.num_layers)):
        raise InputError(
            f"{path}: array '{name}' is not named SITE.LAYER with a site of "
            f"{', '.join(_SITES)} and a layer below {config.num_layers}"
        )
    return Site(site), int(layer)


def _unit(path: str | os.PathLike, name: str, array: np.ndarray, size: int) -> np.ndarray:
    if array.ndim != 2 or array.shape[1] != size or not np.issubdtype(array.dtype, np.floating):
        raise InputError(
            f"{path}: array '{name}' is {array.dtype} {list(array.shape)}; "
            f"floats [{size}] or [number, {size}] are needed"
        )
    array = array.astype(np.float64)
    lengths = np.linalg.norm(array, axis=1)
    wrong = np.flatnonzero(~(np.abs(lengths - 1) <= _TOLERANCE))
    if len(wrong):
        raise InputError(
            f"{path}: vector {wrong[0]} of array '{name}' has length "
            f"{lengths[wrong[0]]:.4g}; unit vectors are needed (divide it by its length)"
        )
    return array / lengths[:, None]
