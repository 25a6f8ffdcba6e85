"""Greedy tokens of one vLLM engine, before and after it is given adapters.

    python vllm_engine.py JOB.json RESULT.json

Runs in vLLM's own Python, with this package on its path.
"""

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams

from esft_jax.serving.vllm import switch_adapter


def main(job: dict) -> list[list[list[int]]]:
    """Tokens for each prompt: of the engine as it starts, then with each of the `adapters`."""
    llm = LLM(
        job["model"],
        dtype="float32",
        enforce_eager=True,
        worker_extension_cls="esft_jax.serving.vllm.ExpertAdapters",
    )
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    options = SamplingParams(temperature=0, max_tokens=job["new_tokens"], ignore_eos=True)

    def complete() -> list[list[int]]:
        return [list(done.outputs[0].token_ids) for done in llm.generate(prompts, options)]

    tokens = [complete()]
    for adapter in job["adapters"]:
        switch_adapter(llm, adapter)
        tokens.append(complete())
    assert "jax" not in sys.modules
    return tokens


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
