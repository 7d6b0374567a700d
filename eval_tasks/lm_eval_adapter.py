"""refmamba as a model of lm-evaluation-harness (extra `lm_eval`), so that any of its tasks can be run.

    lm_eval --model refmamba --model_args pretrained=small,scheme=int8 --tasks arc_easy

The harness finds the model by the entry point `lm_eval.models`, which it reads after 0.4.13. Up to 0.4.13 it knows its
own models only; there, this module registers the model and runs the same command line:

    python -m refmamba.eval_tasks.lm_eval_adapter --model refmamba --model_args pretrained=small,scheme=int8 --tasks arc_easy
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval import utils
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from refmamba.eval_tasks.score import MAX_LENGTH, score, token_request
from refmamba.run.generate import Extent, Generation, Sampler
from refmamba.run.session import ModelChoice, open_session

REQUESTS_AT_ONCE = 64  # requests scored together, neighbours in the order of their tokens, so that they share their contexts
NEW_TOKENS = 256  # generated where a task does not say


@register_model("refmamba")
class RefmambaLM(TemplateLM):  # type: ignore[misc]
    """A model of refmamba. Arguments: pretrained, scheme, backend, device, revision, calibrate, max_length, add_bos_token.

    batch_size and max_batch_size come from the harness and change nothing. Another argument is a TypeError.
    """

    def __init__(
        self, pretrained: str = "small", scheme: str | None = None, backend: str = "cpu", device: str | None = None,
        revision: str | None = None, calibrate: str | None = None, max_length: int = MAX_LENGTH,
        add_bos_token: bool | None = None, batch_size: Any = None, max_batch_size: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if backend in ("cpu", "reference"):
            device = None  # they run on the CPU, and the harness asks for cuda:0 unless its user names a device
        file = Path(calibrate) if calibrate is not None else None
        self._session = open_session(ModelChoice(str(pretrained), scheme, backend, device, revision, file, add_bos_token))
        self.max_length = int(max_length)

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a text."""
        return self._session.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int | None:
        """The token that stands for an empty context."""
        return self._session.tokenizer.prefix_token_id

    @property
    def tokenizer_name(self) -> str:
        """The name under which the harness caches what this tokenizer encodes."""
        return str(self._session.opened.files.tokenizer)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens of a text, with what the tokenizer adds unless it is told not to."""
        return self._session.tokenizer.encode(string, special=add_special_tokens is not False)

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **_: Any) -> list[tuple[float, bool]]:
        pending = [token_request(a, b, self.max_length, f"request {i}") for i, (_, a, b) in enumerate(requests)]
        order = sorted(range(len(pending)), key=lambda i: pending[i].tokens)
        answers: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(order), desc="refmamba", unit="request", disable=disable_tqdm) as bar:
            for start in range(0, len(order), REQUESTS_AT_ONCE):
                block = order[start : start + REQUESTS_AT_ONCE]
                scores = score(self._session.runner, self._session.backend, [pending[i] for i in block])
                for i, answer in zip(block, scores, strict=True):
                    answers[i] = (answer.loglikelihood, answer.greedy)
                    if requests[i][0] is not None:  # a window of a rolling request has no text of its own
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], answers[i])
                bar.update(len(block))
        return [answers[i] for i in range(len(order))]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of max_length as the harness cuts them."""
        totals = []
        for request in requests:
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]), prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length, context_len=1,
            )  # fmt: skip
            pieces = [(None, *utils.make_disjoint_window(window)) for window in windows]
            totals.append(sum(value for value, _ in self._loglikelihood_tokens(pieces, disable_tqdm=True)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Texts, greedy or sampled with seed 0, up to the first of the request's stops."""
        return [self._generate(*request.args) for request in tqdm(requests, desc="refmamba", disable=disable_tqdm)]

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        stops: Sequence[str] = [until] if isinstance(until, str) else until
        count = int(options.get("max_gen_toks", NEW_TOKENS))
        temperature = float(options.get("temperature", 0.0)) if options.get("do_sample") else 0.0
        sampler = Sampler(temperature, int(options.get("top_k", 0)), float(options.get("top_p", 1.0)), 0)
        prompt = self._session.tokenizer.encode_array(context)[-max(1, self.max_length - count) :]
        extent = Extent(count, [stop for stop in stops if stop])
        return Generation(self._session, prompt, sampler, extent).finish().text


if __name__ == "__main__":
    cli_evaluate()
