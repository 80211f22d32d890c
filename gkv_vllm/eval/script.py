# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Texts of which a request decides words beforehand: a logits processor for stock vLLM.

`vllm serve ... --logits-processors gkv_vllm.eval.script:Script`, and in a request
`"vllm_xargs": {"script": [17, -1, 4]}`: the first generated token is 17, the second is the model's
own, the third is 4, and so are all after the script's end. The engine decodes, caches and evicts as
in any other text; only who chooses a token differs. (For Model Runner V1: vLLM refuses this kind of
processor at start-up under V2 or with speculative decoding.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from gkv_vllm.eval.exams import ARGUMENT, OWN

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from vllm import SamplingParams
    from vllm.config import VllmConfig

logger = init_logger(__name__)


class Script(AdapterLogitsProcessor):
    """Lets no token but the script's through, at each place where it names one.

    Only the engine knows its vocabulary, when the request is admitted already: a token that it
    does not have is left to the model, with a warning. Who wants the script checks the text."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        super().__init__(vllm_config, device, is_pin_memory)
        self.vocabulary = vllm_config.model_config.get_vocab_size()

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """VLLMValidationError (HTTP 400) unless a script is a list of token ids and -1."""
        script = _script(sampling_params)
        if script is None:
            return
        if not isinstance(script, list) or not all(type(t) is int and t >= OWN for t in script):
            raise VLLMValidationError(
                f"{ARGUMENT} must be a list of token ids, or {OWN} for the model's own choice"
            )

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Any:
        script = _script(params)
        if not script:
            return None
        if max(script) >= self.vocabulary:
            logger.warning(
                "%s: the vocabulary ends at %d, so the model chooses in the place of token %d",
                ARGUMENT, self.vocabulary - 1, max(script),
            )  # fmt: skip
            script = [token if token < self.vocabulary else OWN for token in script]

        def force(output: list[int], logits: Tensor) -> Tensor:
            if len(output) < len(script) and (token := script[len(output)]) != OWN:
                logits.fill_(float("-inf"))
                logits[token] = 0.0
            return logits

        return force


def _script(params: SamplingParams) -> Any:
    return (params.extra_args or {}).get(ARGUMENT)
