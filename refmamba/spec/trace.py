"""Operations and intermediate values by name: how a forward shows what it does while it runs.

A hook sees values: it is called as hook(site, value), in the order of computation, for one sequence. A site is "embedding",
"norm_f", "lm_head.*" or "layers.{i}.*" and one of the names below; the value is float32 unless the table says otherwise.
The reference's forward can record its operations too, each with its arguments and its result: a `Trace` of `Step`s.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

from numpy.typing import NDArray

Hook = Callable[[str, NDArray[Any]], None]

PRODUCT_SITES = {
    "in": "the activation, (L, K)",
    "transformed": "the activation after a transform, where the scheme has one, (L, K)",
    "in_codes": "its codes, integers (L, K): eq. (8) or (10)",
    "acc": "the integer product, in float64 (L, rows): eq. (11, 12)",
    "result": "its value in float32, (L, rows): eq. (13)",
    "sum": "the sum of the parts' values, where an activation is coded in parts, (L, rows)",
    "out_codes": "codes of the result where the scheme quantizes it, integers (L, rows): eq. (8)",
    "out_value": "those codes read back, (L, rows): eq. (9)",
    "out": "what the next operation reads, with the bias, (L, rows)",
}  # a second transform's value is transformed_2; a second part has in_codes_2, acc_2 and result_2, and so on
LAYER_SITES = {
    "residual_in": "the block's input (L, d_model)",
    "norm": "eq. (16), (L, d_model)",
    "in_proj": PRODUCT_SITES,
    "conv1d": "eq. (17), (L, d_inner)",
    "conv_state": "after the last token (d_inner, d_conv - 1)",
    "u": "eq. (5), silu of the convolution (L, d_inner)",
    "x_proj": PRODUCT_SITES,
    "dt_proj": PRODUCT_SITES,
    "delta": "eq. (18), (L, d_inner)",
    "scan": "eq. (20, 21, 22), (L, d_inner)",
    "ssm_state": "after the last token (d_inner, d_state)",
    "gate": "eq. (23), (L, d_inner)",
    "out_proj": PRODUCT_SITES,
    "residual_out": "eq. (24), the block's output (L, d_model)",
}
MODEL_SITES = {
    "embedding": "eq. (15), (L, d_model)",
    "layers.{i}": LAYER_SITES,
    "norm_f": "eq. (16), (L, d_model) for the positions whose logits are asked for",
    "lm_head": PRODUCT_SITES,
}


def last_site(name: str) -> str:
    """The site without its layer: "layers.3.in_proj.out" -> "in_proj.out"."""
    return name.split(".", 2)[2] if name.startswith("layers.") else name


@dataclass(frozen=True, eq=False)
class Step:
    """One operation of a forward.

    operation: the name of the specification's function. arguments: what it was called with. sites: the names of its results.
    result: what it gave, a tuple where it has several names.
    """

    operation: str
    arguments: tuple[Any, ...]
    sites: tuple[str, ...]
    result: Any

    def values(self) -> list[tuple[str, Any]]:
        """Each site with its value."""
        return list(zip(self.sites, self.result if len(self.sites) > 1 else (self.result,), strict=True))


class Trace(Sequence[Step]):
    """The operations of one sequence's forward, in order.

    trace[3] is a step; trace["layers.0.in_proj.acc"] the value of a site; `step(site)` the step that made it; `layer(0)` and
    `operation("rms_norm")` the steps of a layer, or of an operation.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        self._steps = tuple(steps)
        self._made = {site: step for step in self._steps for site in step.sites}

    @overload
    def __getitem__(self, key: int) -> Step: ...
    @overload
    def __getitem__(self, key: slice) -> "Trace": ...
    @overload
    def __getitem__(self, key: str) -> Any: ...
    def __getitem__(self, key: int | slice | str) -> Any:
        """A step by its number, several as a Trace, or the value of a site. Raises KeyError for an unknown site."""
        if isinstance(key, str):
            return dict(self._made[key].values())[key]
        return Trace(self._steps[key]) if isinstance(key, slice) else self._steps[key]

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[Step]:
        return iter(self._steps)

    @property
    def sites(self) -> list[str]:
        """The names of all values, in order."""
        return list(self._made)

    def step(self, site: str) -> Step:
        """The step that made a site's value. Raises KeyError."""
        return self._made[site]

    def layer(self, i: int) -> "Trace":
        """The steps of one layer."""
        return Trace([step for step in self._steps if step.sites[0].startswith(f"layers.{i}.")])

    def operation(self, name: str) -> "Trace":
        """The steps of one operation."""
        return Trace([step for step in self._steps if step.operation == name])


class Tracer:
    """Runs the operations of one forward, and shows them to whoever looks. Costs nothing where nobody does.

    hook: sees the value of every site. record: takes every step.
    """

    def __init__(self, hook: Hook | None = None, record: Callable[[Step], None] | None = None) -> None:
        self._hook, self._record = hook, record

    def __call__(self, sites: str, operation: Callable[..., Any], *arguments: Any) -> Any:
        """operation(*arguments). sites: the name of its result; where it gives several, their names with spaces between."""
        result = operation(*arguments)
        if self._record or self._hook:
            self._show(Step(operation.__name__, arguments, tuple(sites.split()), result))
        return result

    def _show(self, step: Step) -> None:
        if self._record:
            self._record(step)
        if self._hook:
            for site, value in step.values():
                self._hook(site, getattr(value, "q", value))

    def see(self, site: str, value: NDArray[Any]) -> None:
        """Show a value under one more name: that of the place where it is read."""
        if self._hook:
            self._hook(site, value)
