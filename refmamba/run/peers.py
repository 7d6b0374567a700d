"""Other programs that run the same model, for `refmamba bench --compare`: transformers and llama.cpp, where installed."""

import contextlib
import importlib.util
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from refmamba.formats.dequantized import hugging_face_name
from refmamba.formats.gguf_writing import TYPES, write_gguf
from refmamba.formats.weights import file_shape
from refmamba.spec.arith import IntArray
from refmamba.spec.config import ParameterSource

LLAMA_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "Q4_0": 2, "Q4_K_M": 15}  # llama.cpp's file types


class Peer(Protocol):
    """Something that can be timed."""

    name: str

    def prefill(self, tokens: IntArray) -> None:
        """Run a prompt (L,) from the start, with the logits of its last token."""

    def decode(self, tokens: IntArray) -> None:
        """After a prefill: one token after the other, with the logits of each."""


def installed(package: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(package) is not None


_APART: list[Peer] = []  # in a process of `Apart`, its peer


def _make(make: Callable[..., Peer], arguments: tuple[Any, ...]) -> None:
    _APART.append(make(*arguments))


def _call(method: str, tokens: IntArray) -> float:
    start = time.perf_counter()
    getattr(_APART[0], method)(tokens)
    return time.perf_counter() - start


class Apart:
    """A peer, make(*arguments), in a process of its own: another program that crashes takes nothing with it.

    Once that process has died, and where `make` failed, every call raises an exception of any kind.
    """

    def __init__(self, name: str, make: Callable[..., Peer], *arguments: Any) -> None:
        # spawn: a forked child would share this process's threads and their locks.
        self.name, self._pool = name, ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        self._made = self._pool.submit(_make, make, arguments)

    def seconds(self, method: str, tokens: IntArray) -> float:
        """Seconds that `prefill` or `decode` takes, there."""
        self._made.result()
        return self._pool.submit(_call, method, tokens).result()

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown()


class Transformers:
    """transformers' MambaForCausalLM in float32, eager, with its cache."""

    name = "transformers float32"

    def __init__(self, source: ParameterSource, threads: int) -> None:
        import torch
        from transformers import MambaConfig, MambaForCausalLM

        torch.set_num_threads(threads)
        c = source.config
        config = MambaConfig(
            hidden_size=c.d_model, num_hidden_layers=c.n_layer, vocab_size=c.vocab_size, state_size=c.d_state,
            conv_kernel=c.d_conv, expand=c.expand, time_step_rank=c.dt_rank, layer_norm_epsilon=c.norm_eps,
            use_bias=c.use_bias, use_conv_bias=c.use_conv_bias, tie_word_embeddings=c.tie_embeddings,
            pad_token_id=0, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        self._torch: Any = torch
        self._model = cast(Any, MambaForCausalLM(config))
        shapes = {name: file_shape(name, shape) for name, shape in c.shapes().items()}
        state = {hugging_face_name(name): torch.tensor(source.read(name)).reshape(shape) for name, shape in shapes.items()}
        self._model.load_state_dict(state, strict=not c.tie_embeddings)
        self._model.eval()
        self._cache: Any = None

    def prefill(self, tokens: IntArray) -> None:
        """See Peer."""
        with self._torch.inference_mode():
            ids = self._torch.from_numpy(tokens.astype(np.int64))[None]
            self._cache = self._model(ids, use_cache=True, logits_to_keep=1).cache_params

    def decode(self, tokens: IntArray) -> None:
        """See Peer."""
        with self._torch.inference_mode():
            for token in tokens:
                ids = self._torch.tensor([[int(token)]])
                self._cache = self._model(ids, cache_params=self._cache, use_cache=True, logits_to_keep=1).cache_params


def write_for_llama_cpp(source: ParameterSource, file: Path, kind: str) -> None:
    """The model as llama.cpp reads it, without a tokenizer, in one of LLAMA_TYPES."""
    if kind in TYPES:
        write_gguf(source, file, kind, file.stem)
        return
    import llama_cpp

    plain = file.with_suffix(".f32.gguf")
    write_gguf(source, plain, "F32", file.stem)
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = LLAMA_TYPES[kind]
    with quiet():
        failed = llama_cpp.llama_model_quantize(bytes(plain), bytes(file), parameters)
    if failed:
        raise OSError(f"{file}: llama.cpp could not write it")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """llama.cpp writes its log to stderr from C: send it nowhere."""
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


class LlamaCpp:
    """llama.cpp through llama-cpp-python, from a GGUF file."""

    def __init__(self, file: Path, kind: str, threads: int) -> None:
        import llama_cpp

        self.name = f"llama.cpp {kind}"
        with quiet():
            self._model: Any = llama_cpp.Llama(
                str(file), n_ctx=4096, n_batch=512, n_ubatch=512, n_threads=threads, n_threads_batch=threads, verbose=False
            )

    def prefill(self, tokens: IntArray) -> None:
        """See Peer."""
        self._model.reset()
        self._model._ctx.kv_cache_clear()
        self._model.eval(tokens.tolist())

    def decode(self, tokens: IntArray) -> None:
        """See Peer."""
        for token in tokens:
            self._model.eval([int(token)])
