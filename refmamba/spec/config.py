"""The shape of a Mamba model (Gu and Dao, arXiv 2312.00752, section 3.4)."""

from dataclasses import dataclass
from typing import Protocol

from refmamba.errors import CheckpointError
from refmamba.spec.arith import F32Array


@dataclass(frozen=True)
class MambaConfig:
    """Sizes and switches of one model. The names are those of the Mamba code.

    Raises CheckpointError for a size below one.
    """

    d_model: int  # width of the residual stream
    n_layer: int  # number of blocks
    vocab_size: int  # rows of the embedding, padding rows included
    d_state: int = 16  # N, states of each channel
    d_conv: int = 4  # taps of the causal convolution
    expand: int = 2  # d_inner = expand * d_model
    dt_rank: int = 0  # rank of the step projection; 0 means ceil(d_model / 16)
    norm_eps: float = 1e-5
    use_bias: bool = False  # in_proj and out_proj have a bias
    use_conv_bias: bool = True
    tie_embeddings: bool = True  # the head is the embedding
    states_A: bool = False  # the checkpoint holds the state matrix itself too: `state_matrices`

    def __post_init__(self) -> None:
        if self.dt_rank == 0:
            object.__setattr__(self, "dt_rank", -(-self.d_model // 16))
        for name in ("d_model", "n_layer", "vocab_size", "d_state", "d_conv", "expand", "dt_rank"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise CheckpointError(f"the model's {name} is {value!r}; it must be a whole number of at least 1")

    @property
    def d_inner(self) -> int:
        """Channels of the scan."""
        return self.expand * self.d_model

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter, in the order in which the model uses them."""
        d, e, n, r = self.d_model, self.d_inner, self.d_state, self.dt_rank
        shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (self.vocab_size, d)}
        for i in range(self.n_layer):
            layer: dict[str, tuple[int, ...]] = {"norm.weight": (d,), "in_proj.weight": (2 * e, d)}
            layer |= {"in_proj.bias": (2 * e,)} if self.use_bias else {}
            layer |= {"conv1d.weight": (e, self.d_conv)}
            layer |= {"conv1d.bias": (e,)} if self.use_conv_bias else {}
            layer |= {"x_proj.weight": (r + 2 * n, e), "dt_proj.weight": (e, r), "dt_proj.bias": (e,)}
            layer |= {"A_log": (e, n), "D": (e,), "out_proj.weight": (d, e)}
            layer |= {"out_proj.bias": (d,)} if self.use_bias else {}
            shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
        shapes["norm_f.weight"] = (d,)
        if not self.tie_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, d)
        return shapes

    def state_matrices(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every A that the checkpoint holds beside A_log, which is then log(-A): eq. (19)."""
        return {f"layers.{i}.A": (self.d_inner, self.d_state) for i in range(self.n_layer) if self.states_A}


class ParameterSource(Protocol):
    """A checkpoint that is read tensor by tensor: the names and shapes are `MambaConfig.shapes` and `state_matrices`."""

    @property
    def config(self) -> MambaConfig:
        """The model's sizes."""

    def read(self, name: str) -> F32Array:
        """One tensor, float32."""


def kind_of(name: str) -> str:
    """A parameter's name without its layer: "layers.3.D" -> "D"."""
    return name.split(".", 2)[2] if name.startswith("layers.") else name
