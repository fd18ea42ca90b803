"""The body of a model as a site, for methods that put virtual tokens into it. There is no matrix."""

from typing import Any, NoReturn

from torch import Tensor

from loratory.sites.site import Site


class BodySite(Site):
    """A body: `width` numbers for each token."""

    kind = "block"

    @property
    def width(self) -> int:
        raise TypeError(f"{type(self).__name__} does not state its width")

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.width,)

    @property
    def config(self) -> Any:
        return self.module.config

    def read(self) -> Tensor:
        self._no_matrix()

    def write(self, W: Tensor) -> None:
        self._no_matrix()

    def apply(self, x: Tensor, W: Tensor) -> Tensor:
        self._no_matrix()

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        self._no_matrix()

    def up(self, h: Tensor, B: Tensor) -> Tensor:
        self._no_matrix()

    def _no_matrix(self) -> NoReturn:
        raise ValueError(
            f"'{self.name or type(self.module).__name__}' is the body of a model, which has no matrix; name its layers with where="
        )
