"""Greedy tokens of one vLLM engine, before and after it is given other experts.

    python vllm_engine.py JOB.json RESULT.json

Runs in vLLM's own Python, which needs nothing else. The worker extension of docs/serving.md has to
lie on its path as `experts.py`.
"""

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams


def main(job: dict) -> list[list[list[int]]]:
    """Tokens for each prompt: of the engine as it starts, then after each of the job's `loads`."""
    llm = LLM(
        job["model"],
        dtype="float32",
        enforce_eager=True,
        worker_extension_cls="experts.Experts",
    )
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    options = SamplingParams(temperature=0, max_tokens=job["new_tokens"], ignore_eos=True)

    def complete() -> list[list[int]]:
        return [list(done.outputs[0].token_ids) for done in llm.generate(prompts, options)]

    tokens = [complete()]
    for arguments in job["loads"]:
        llm.collective_rpc("load_experts", args=tuple(arguments))
        llm.reset_prefix_cache()
        tokens.append(complete())
    return tokens


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
