"""How a checkpoint's tensors hold the parameters of a Decoder.

A family says it as a table of `Weight`s; `rows` expands the table to the tensors of one model.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from models.config import DecoderConfig
from models.families.family import Weight

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor of one model.

    Attributes:
        name: of the tensor.
        paths: of the parameters that it holds.
        layer: which layer of them; None where the parameters have no layer axis.
        shapes: of the parameters, in one layer.
        transposed: whether the tensor is stored with its outputs first.
        groups: pieces into which every parameter's outputs are cut; all parameters' first pieces
            are stored before their second ones.
    """

    name: str
    paths: tuple[Path, ...]
    layer: int | None
    shapes: tuple[tuple[int, ...], ...]
    transposed: bool
    groups: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor, as it is stored."""
        outputs = sum(shape[-1] for shape in self.shapes)
        shape = (*self.shapes[0][:-1], outputs)
        return shape[::-1] if self.transposed else shape

    @property
    def size(self) -> int:
        """Numbers in the tensor."""
        return int(np.prod(self.shape))

    def runs(self, parameter: int, outputs: slice) -> Iterator[tuple[slice, slice]]:
        """Where the tensor holds some of a parameter's outputs.

        Args:
            parameter: index of its path.
            outputs: which of them; neither bound may be None.

        Yields:
            Parts of that range, counted from its start, and the tensor's outputs that hold them.
        """
        widths = [shape[-1] // self.groups for shape in self.shapes]
        width, before, period = widths[parameter], sum(widths[:parameter]), sum(widths)
        for group in range(outputs.start // width, -(-outputs.stop // width)):
            first = max(outputs.start, group * width)
            last = min(outputs.stop, (group + 1) * width)
            shift = group * (period - width) + before
            yield (
                slice(first - outputs.start, last - outputs.start),
                slice(first + shift, last + shift),
            )

    def join(self, parameters: list[np.ndarray]) -> np.ndarray:
        """The tensor that holds the parameters, as it is stored."""
        grouped = [p.reshape(*p.shape[:-1], self.groups, -1) for p in parameters]
        tensor = np.concatenate(grouped, axis=-1)
        tensor = tensor.reshape(*tensor.shape[:-2], -1)
        return np.ascontiguousarray(tensor.T if self.transposed else tensor)


def rows(
    table: Iterable[Weight], config: DecoderConfig, shapes: Mapping[Path, tuple[int, ...]]
) -> list[Row]:
    """The tensors that hold a model's parameters, each parameter once.

    Rows of the table whose parameters the model does not have (a bias, the unembedding) are left
    out.

    Args:
        table: the family's.
        config: the shape of the model.
        shapes: of its parameters; those under `blocks` have a leading layer axis.

    Raises:
        ValueError: a parameter is in no row of the table.
    """
    found = []
    for weight in table:
        paths = tuple(tuple(parameter.split(".")) for parameter in weight.parameters)
        if not all(path in shapes for path in paths):
            continue
        stacked = paths[0][0] == "blocks"
        layers = range(config.num_layers) if stacked else (None,)
        of_layer = tuple(tuple(shapes[path][1 if stacked else 0 :]) for path in paths)
        groups = config.num_heads if weight.by_head else 1
        found += [
            Row(
                weight.tensor.format(layer=layer), paths, layer, of_layer, weight.transposed, groups
            )
            for layer in layers
        ]
    unnamed = shapes.keys() - {path for row in found for path in row.paths}
    if unnamed:
        raise ValueError(f"the weight table of {config.family} lacks {sorted(unnamed)}")
    return found
